"""What a name means to whom."""

import pytest

from llm_engine.catalog import LONGEST_CHAIN, Catalog, missing
from llm_engine.errors import InvalidRequest, NotFound
from llm_engine.records import (
    Directory,
    EndpointStatus,
    ModelRecord,
    Principal,
    RoutingTable,
    Scope,
)
from llm_engine.routing import Balancer
from llm_engine.statuses import EndpointState
from tests.support.adapters import adapter

ME, YOU = Principal("me", frozenset()), Principal("you", frozenset())
ADMIN = Principal("boss", frozenset({Scope.ADMIN}))


def catalog_of(endpoints=(), models=(), adapters=()):
    balancer = Balancer()
    balancer.update(RoutingTable(1, {each.name: each for each in endpoints}))
    catalog = Catalog(balancer)
    by_owner: dict[str, dict[str, ModelRecord]] = {}
    for each in models:
        by_owner.setdefault(each.owner, {})[each.name] = each
    catalog.update(Directory(1, {}, by_owner, {each.name: each for each in adapters}))
    return catalog


def endpoint(name, owner="llm-engine", public=True, task="generate", **values):
    return EndpointStatus(
        name, "m", task, EndpointState.READY, owned_by=owner, public=public, **values
    )


def model(name, owner="me", number=0, **values):
    return ModelRecord(f"mdl_{number}", owner, name, **values)


def base(name="base", **values):
    return endpoint(name, max_adapters=4, max_adapter_rank=16, **values)


def tuned(name="ft:base", owner="me", **values):
    return adapter(name, **{"owner": owner, "base": "base", "weights": "m", **values})


def test_an_endpoint_is_found_by_those_who_may_see_it():
    catalog = catalog_of([endpoint("open"), endpoint("mine", "me", public=False)])
    assert catalog.resolve(YOU, "open").endpoint.name == "open"
    assert catalog.resolve(ME, "mine").endpoint.name == "mine"
    assert catalog.resolve(ADMIN, "mine").endpoint.name == "mine"
    with pytest.raises(NotFound):
        catalog.resolve(YOU, "mine")


def test_an_endpoint_is_asked_only_for_what_it_does():
    catalog = catalog_of([endpoint("chat"), endpoint("vectors", task="embed")],
                         [model("alias", model="vectors")])  # fmt: skip
    assert catalog.resolve(ME, "alias", "embed").endpoint.name == "vectors"
    with pytest.raises(InvalidRequest, match="'alias' makes embeddings"):
        catalog.resolve(ME, "alias", "generate")
    with pytest.raises(InvalidRequest):
        catalog.resolve(ME, "chat", "embed")


def test_an_alias_leads_on_and_its_limits_with_it():
    first, second = model("a", model="b"), model("b", model="e")
    route = catalog_of([endpoint("e")], [first, second]).resolve(ME, "a")
    assert (route.name, route.endpoint.name) == ("a", "e")
    assert route.registered == (first, second)


def test_an_alias_may_lead_to_an_external_model():
    external = model("x", url="http://x.example")
    route = catalog_of([], [model("a", model="x"), external]).resolve(ME, "a")
    assert route.upstream == external and route.endpoint is None


def test_an_alias_that_leads_nowhere_says_where():
    catalog = catalog_of([], [model("a", model="b"), model("b", model="gone"), model("self")])
    with pytest.raises(NotFound, match="'a' is an alias that leads to 'gone'"):
        catalog.resolve(ME, "a")
    with pytest.raises(NotFound, match="'self'"):
        catalog.resolve(ME, "self")


def test_circles_and_endless_chains_come_to_an_end():
    chain = [model(f"m{i}", model=f"m{i + 1}", number=i) for i in range(50)]
    catalog = catalog_of([endpoint(f"m{LONGEST_CHAIN + 1}")], [model("a", model="b"),
                         model("b", model="a"), *chain])  # fmt: skip
    for name in ("a", "b", "m0", "m10"):
        with pytest.raises(NotFound):
            catalog.resolve(ME, name)


def test_an_alias_may_bear_the_name_of_the_endpoint_that_came_later():
    catalog = catalog_of([endpoint("same")], [model("same", model="same")])
    assert catalog.resolve(ME, "same").endpoint.name == "same"


def test_ones_own_name_comes_first_then_endpoints_then_what_others_made_public():
    mine = model("x", "me", 2, url="http://mine.example")
    public = [model("x", "you", 3, url="http://you.example", public=True),
              model("x", "first", 1, url="http://first.example", public=True)]  # fmt: skip
    third = Principal("third", frozenset())
    assert catalog_of([endpoint("x")], [mine, *public]).resolve(ME, "x").upstream is mine
    assert catalog_of([endpoint("x")], public).resolve(third, "x").endpoint is not None
    assert catalog_of([], public).resolve(third, "x").upstream.owner == "first", "the older one"
    with pytest.raises(NotFound):
        catalog_of([], [mine]).resolve(third, "x")
    assert [m.owner for m in catalog_of([], [mine, *public]).models(ME)] == ["me"]
    assert [m.owner for m in catalog_of([], [mine, *public]).models(third)] == ["first"]


def test_a_public_alias_leads_to_what_its_owner_may_use():
    catalog = catalog_of([endpoint("private", "me", public=False)],
                         [model("shared", model="private", public=True)])  # fmt: skip
    assert catalog.resolve(YOU, "shared").endpoint.name == "private"


def test_the_first_fallback_on_the_way_counts_and_belongs_to_who_set_it():
    served = endpoint("e", "you", fallback="theirs")
    assert fallback(catalog_of([served]), ME, "e") == ("theirs", "you")
    plain = catalog_of([served], [model("a", model="e")])
    assert fallback(plain, ME, "a") == ("theirs", "you"), "not with the eyes of the alias's owner"
    own = catalog_of([served], [model("a", model="b"), model("b", model="e", fallback="mine")])
    assert fallback(own, ME, "a") == ("mine", "me")
    external = catalog_of([], [model("x", url="http://x.example", fallback="mine")])
    assert fallback(external, ME, "x") == ("mine", "me")


def fallback(catalog, who, name):
    route = catalog.resolve(who, name)
    return route.fallback, route.owner


def test_an_adapter_leads_to_its_base_for_its_owner():
    one = tuned()
    catalog = catalog_of([base()], adapters=[one])
    for who in (ME, ADMIN, Principal("x", frozenset(), sees_all=True)):
        route = catalog.resolve(who, "ft:base", "generate")
        assert (route.endpoint.name, route.adapter, route.name) == ("base", one, "ft:base")
    with pytest.raises(NotFound) as hidden:
        catalog.resolve(YOU, "ft:base")
    assert hidden.value.message == missing("ft:base").message
    with pytest.raises(InvalidRequest, match="generates text"):
        catalog.resolve(ME, "ft:base", "embed")
    assert [a.name for a in catalog.adapters(ME)] == ["ft:base"]
    assert not list(catalog.adapters(YOU))


@pytest.mark.parametrize(
    ("endpoints", "error", "said"),
    [
        ([], NotFound, "'ft:base' is an adapter of 'base', which does not exist here any more"),
        ([endpoint("base", "you", public=False)], NotFound, "does not exist here any more"),
        ([endpoint("base")], InvalidRequest, r"'base' serves none \(max_adapters: 0\)"),
        ([base(name="base")], InvalidRequest, "trained on old, but 'base' serves m now"),
        (
            [endpoint("base", max_adapters=1, max_adapter_rank=8)],
            InvalidRequest,
            "rank 16, and 'base' serves those up to 8",
        ),
    ],
)
def test_an_adapter_whose_base_cannot_serve_it_says_why(endpoints, error, said):
    old = {"weights": "old"} if "old" in said else {}
    catalog = catalog_of(endpoints, adapters=[tuned(rank=16, **old)])
    with pytest.raises(error, match=said):
        catalog.resolve(ME, "ft:base")
    with pytest.raises(NotFound) as hidden:
        catalog.resolve(YOU, "ft:base")
    assert "adapter" not in hidden.value.message


def test_an_alias_may_lead_to_an_adapter_and_adapters_have_no_fallback_of_their_base():
    one = tuned()
    shared = model("shared", model="ft:base", public=True)
    catalog = catalog_of([base(fallback="other")], [shared], [one])
    route = catalog.resolve(YOU, "shared")
    assert route.adapter is one and route.registered == (shared,)
    assert fallback(catalog, ME, "ft:base") == (None, "me")
    safe = model("safe", model="ft:base", fallback="base")
    assert fallback(catalog_of([base()], [safe], [one]), ME, "safe") == ("base", "me")


def test_ones_own_alias_and_endpoints_come_before_adapters_and_those_before_others_models():
    one = tuned("x")
    public = model("x", "you", url="http://you.example", public=True)
    assert catalog_of([base()], [public], [one]).resolve(ME, "x").adapter is one
    assert catalog_of([base()], [public], [one]).resolve(YOU, "x").upstream is public
    mine = model("x", url="http://me.example")
    hidden = catalog_of([base()], [mine], [one])
    assert hidden.resolve(ME, "x").upstream is mine and not list(hidden.adapters(ME))
    hidden = catalog_of([base(), base("x")], adapters=[one])
    assert hidden.resolve(ME, "x").adapter is None and not list(hidden.adapters(ME))


def test_what_the_directory_does_not_tell_yet():
    catalog, one = catalog_of([base()]), tuned()
    catalog.learn(one)
    assert catalog.resolve(ME, "ft:base").adapter is one
    catalog.forget(one)
    with pytest.raises(NotFound):
        catalog.resolve(ME, "ft:base")
