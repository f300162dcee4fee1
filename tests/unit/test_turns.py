"""Whose turn it is, where more adapters are asked for than there are slots."""

import asyncio

import pytest

from llm_engine.engine.turns import Pace, TooMany, Turns


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def turns(slots: int, clock: Clock, most_waiting: int = 100) -> Turns:
    return Turns(slots, most_waiting, turn_s=1.0, clock=clock)


async def entered(made: Turns, name: str, deferred: bool = False) -> asyncio.Task[None]:
    task = asyncio.create_task(made.enter(name, deferred))
    await asyncio.sleep(0)
    return task


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_as_many_names_as_slots_run_at_once(clock):
    made = turns(2, clock)
    a, b, c = [await entered(made, name) for name in "abc"]
    assert a.done() and b.done() and not c.done() and made.waiting == 1
    assert (await entered(made, "a")).done(), "a name that runs needs no other slot"
    made.leave("b")
    await settle()
    assert c.done() and made.waiting == 0


async def test_a_name_that_others_wait_for_takes_no_more_once_its_turn_is_over(clock):
    made = turns(1, clock)
    await made.enter("a")
    other = await entered(made, "b")
    clock.now = 0.5
    assert (await entered(made, "a")).done(), "its turn is not over"
    clock.now = 1.0
    late = await entered(made, "a")
    assert not late.done() and not other.done()
    made.leave("a")
    await settle()
    assert not other.done(), "one of its requests runs still"
    made.leave("a")
    await settle()
    assert other.done() and not late.done()
    made.leave("b")
    await settle()
    assert late.done(), "and then it has another turn"


async def test_without_others_a_turn_never_ends(clock):
    made = turns(1, clock)
    for _ in range(5):
        await made.enter("a")
        clock.now += 10


async def test_no_more_turns_end_than_others_wait_for(clock):
    made = turns(3, clock)
    for name in "abc":
        await made.enter(name)
        clock.now += 1
    clock.now += 10
    await entered(made, "x")
    assert not (await entered(made, "a")).done(), "the longest turn"
    assert (await entered(made, "b")).done() and (await entered(made, "c")).done()


async def test_all_that_wait_for_a_name_begin_together(clock):
    made = turns(1, clock)
    await made.enter("a")
    waiting = [await entered(made, "b") for _ in range(5)]
    made.leave("a")
    await settle()
    assert all(task.done() for task in waiting)


async def test_every_name_comes_to_its_turn(clock):
    """Ten adapters asked for without a pause, two slots: none starves."""
    made = turns(2, clock)
    served = dict.fromkeys("abcdefghij", 0)

    async def ask(name: str) -> None:
        while clock.now < 60:
            await made.enter(name)
            served[name] += 1
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            made.leave(name)

    async def tick() -> None:
        while clock.now < 60:
            clock.now += 0.01
            await asyncio.sleep(0)

    await asyncio.gather(tick(), *(ask(name) for name in served for _ in range(3)))
    assert min(served.values()) > max(served.values()) / 4


async def test_batches_wait_behind_the_others(clock):
    made = turns(1, clock)
    await made.enter("a")
    batch = await entered(made, "b", deferred=True)
    person = await entered(made, "c")
    made.leave("a")
    await settle()
    assert person.done() and not batch.done()


async def test_who_leaves_the_line_is_forgotten(clock):
    made = turns(1, clock)
    await made.enter("a")
    clock.now = 5
    b = await entered(made, "b")
    a = await entered(made, "a")
    assert not a.done()
    b.cancel()
    await settle()
    assert a.done(), "nobody else waits any more"
    made.leave("a")
    made.leave("a")
    c = await entered(made, "c")
    assert c.done()


async def test_who_is_cancelled_just_when_its_turn_comes_gives_it_back(clock):
    made = turns(1, clock)
    await made.enter("a")
    b = await entered(made, "b")
    made.leave("a")  # b's future has its result; b has not run yet
    b.cancel()
    await settle()
    assert b.cancelled()
    assert (await entered(made, "c")).done()


async def test_the_line_has_an_end(clock):
    made = turns(1, clock, most_waiting=1)
    await made.enter("a")
    await entered(made, "b")
    with pytest.raises(TooMany):
        await made.enter("c")


def test_loads_are_free_until_they_take_too_much_of_the_time(clock):
    pace = Pace(share=0.1, burst_s=0.5, clock=clock)
    for _ in range(5):
        assert pace.wait_s() == 0
        pace.spend(0.1)
    assert pace.wait_s() == 0, "what was saved is used up, not more"
    pace.spend(0.1)
    assert pace.wait_s() == pytest.approx(1)
    clock.now += 1
    assert pace.wait_s() == 0
    clock.now += 100
    for _ in range(6):
        pace.spend(0.1)
    assert pace.wait_s() == pytest.approx(1), "no more is saved than a burst"


def test_a_load_that_waited_for_the_engine_counts_as_what_it_costs(clock):
    pace = Pace(share=0.1, burst_s=0.1, clock=clock)
    pace.spend(0.01)
    for _ in range(9):
        pace.spend(5.0)
    assert pace.wait_s() == 0


async def test_while_loads_must_wait_what_is_in_memory_goes_on(clock):
    in_memory, wait = {"a"}, 0.05
    made = Turns(1, 100, lambda name: 0.0 if name in in_memory else wait, clock=clock)
    other = await entered(made, "b")
    assert (await entered(made, "a")).done() and not other.done()
    made.leave("a")
    await settle()
    assert not other.done()
    wait = 0.0
    await asyncio.sleep(0.1)
    assert other.done(), "nobody had to come or go for it"
