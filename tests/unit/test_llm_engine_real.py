"""Scale's client in front of a real vLLM on the CPU: what the fake engine does not understand."""

import pytest

from llm_engine.config import EndpointSettings
from tests.api.test_llm_engine_dialect import import_client, use
from tests.support.gateway import GatewayThread


class PatientGateway(GatewayThread):
    """A real engine starts in 15 s, or in two minutes where others want the cores."""

    def __enter__(self):
        self._thread.start()
        if not self._ready.wait(240):
            self.__exit__()
            raise AssertionError("the gateway did not start")
        if self._failure is not None:
            raise self._failure
        return self


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_real_engine_counts_and_tells_its_tokens():
    chat = EndpointSettings(name="chat", model="builtin:chat")
    with PatientGateway([chat]) as gateway:
        client = import_client()
        use(client, gateway)
        ask = client.Completion.create
        asked = {"model": "chat", "prompt": "The capital of France is", "temperature": 0.0}
        told = ask(**asked, max_new_tokens=8, return_token_log_probs=True).output
        assert told.num_completion_tokens == len(told.tokens) == 8
        assert all(token.log_prob <= 0 for token in told.tokens)
        rows = [
            event.output
            for event in ask(**asked, max_new_tokens=8, return_token_log_probs=True, stream=True)
        ]
        assert "".join(row.text for row in rows) == told.text
        assert [row.token.token for row in rows if row.token] == [t.token for t in told.tokens]
        assert rows[-1].finished and not any(row.finished for row in rows[:-1])
        assert rows[-1].num_completion_tokens == 8
        assert rows[-1].num_prompt_tokens == told.num_prompt_tokens > 1
        chosen = ask(**asked, max_new_tokens=8, guided_choice=["zebra", "yak"]).output.text
        assert chosen in ("zebra", "yak")
        assert ask(**asked, max_new_tokens=8, guided_regex="[0-9]{3}").output.text.isdigit()
        stopped = ask(**asked, max_new_tokens=8, stop_sequences=[told.text[3:6]])
        assert stopped.output.text == told.text[: told.text.index(told.text[3:6])]
        with pytest.raises(client.errors.BadRequestError, match=r"max_new_tokens|context"):
            ask(**asked, max_new_tokens=10**6)
        with pytest.raises(client.errors.BadRequestError):
            next(ask(**asked, max_new_tokens=8, guided_grammar="root ::= (", stream=True))
