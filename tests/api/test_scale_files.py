"""Scale's File.*, driven by its own client `llmengine`, and the same files in OpenAI's dialect."""

import pytest

from tests.api.test_llm_engine_dialect import import_client, use
from tests.support.files import KEY, clear, form, http, kept, official
from tests.support.gateway import GatewayThread
from tests.support.upstream import new_key

PATH = "/llm-engine/v1/files"
TEXT = 'prompt,response\n"Wo?","überall 🙂"\n\t\\"\x00'


@pytest.fixture(scope="module")
def gateway():
    sections = {"files": {"max_bytes": 2**22}}
    with GatewayThread([], sections=sections, api_keys=[KEY]) as running:
        yield running


@pytest.fixture(scope="module")
def ann(gateway):
    return new_key(gateway, KEY, "ann", "files")


@pytest.fixture
def scale(gateway, ann):
    client = import_client()
    use(client, gateway, ann)
    yield client
    client.api_engine.set_base_path(None)
    client.api_engine.set_api_key(None)


@pytest.fixture(autouse=True)
def fresh(gateway):
    yield
    clear(gateway)


@pytest.mark.parametrize("mode", ["r", "rb"])
def test_the_client_uploads_gets_lists_downloads_and_deletes(scale, tmp_path, mode):
    path = tmp_path / "training_dataset.csv"
    path.write_text(TEXT, newline="")
    with path.open(mode) as opened:
        id = scale.File.upload(opened).id
    assert id.startswith("file-")
    told = scale.File.get(id)
    assert (told.id, told.filename, told.size) == (id, path.name, len(TEXT.encode()))
    assert scale.File.list().files == [told]
    assert scale.File.download(id).content == TEXT and scale.File.download(id).id == id
    assert scale.File.delete(id).deleted is True
    for ask in (scale.File.get, scale.File.download, scale.File.delete):
        with pytest.raises(scale.errors.NotFoundError, match="The specified file could not"):
            ask(id)
    assert scale.File.list().files == []


def test_a_file_is_the_same_in_both_dialects(gateway, ann, scale, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(TEXT, newline="")
    with path.open("rb") as opened:
        theirs = scale.File.upload(opened).id
    with official(gateway, ann) as client:
        row = client.files.retrieve(theirs)
        assert (row.purpose, row.filename, row.bytes) == ("user_data", "a.csv", len(TEXT.encode()))
        assert client.files.content(theirs).read() == TEXT.encode()
        ours = client.files.create(file=("b.txt", b"b"), purpose="assistants")
        assert scale.File.download(ours.id).content == "b"
        assert [each.id for each in scale.File.list().files] == [ours.id, theirs]
        client.files.delete(theirs)
    with pytest.raises(scale.errors.NotFoundError):
        scale.File.get(theirs)


def test_large_text_is_cut_between_characters_and_comes_back_whole(scale, tmp_path):
    text = "x" + 'ü🙂\n"' * 300_000  # pieces of the storage end within characters
    path = tmp_path / "large.txt"
    path.write_text(text)
    with path.open("rb") as opened:
        assert scale.File.download(scale.File.upload(opened).id).content == text


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"cut \xf0\x9f"])
def test_bytes_that_are_no_text_come_as_far_as_they_can(scale, tmp_path, data):
    path = tmp_path / "data.bin"
    path.write_bytes(data)
    with path.open("rb") as opened:
        id = scale.File.upload(opened).id
    assert scale.File.get(id).size == len(data)
    assert scale.File.download(id).content == data.decode(errors="replace")


def test_what_is_wrong_is_told_in_this_dialects_words(gateway, ann):
    kind = {"content-type": "multipart/form-data; boundary=B"}
    for body in (form(), form((b'Content-Disposition: form-data; name="x"', b"1"))):
        with http(gateway, ann) as client:
            answer = client.post(PATH, content=body, headers=kind)
        assert answer.status_code == 400 and set(answer.json()) == {"detail"}
    with http(gateway, ann) as client:
        answer = client.post(PATH, files={"file": ("a", b"x" * (2**22 + 1))})
        assert answer.status_code == 413 and "files.max_bytes" in answer.json()["detail"]
        assert client.post(PATH, json={}).status_code == 400
    assert kept(gateway) == []


def test_another_owners_file_does_not_exist(gateway, ann):
    with http(gateway, ann) as client:
        id = client.post(PATH, files={"file": ("a", b"1")}).json()["id"]
    scopeless = new_key(gateway, KEY, "ann", "inference")
    ben = new_key(gateway, KEY, "ben", "files")
    for key, status in [(ben, 404), (scopeless, 403), (None, 401), (KEY, 200)]:
        with http(gateway, key) as client:
            for path in (f"{PATH}/{id}", f"{PATH}/{id}/content"):
                assert client.get(path).status_code == status
            assert client.delete(f"{PATH}/{id}").status_code == status
