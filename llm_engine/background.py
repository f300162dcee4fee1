"""How much a model can do for batches, beside what people wait for. Pure.

Batches fill what the engines have left: their requests stand behind everybody's in an engine's
queue, and of them no more are under way than these rules allow.
"""

from collections.abc import Collection

from llm_engine.records import EndpointStatus, ReplicaReport

#: Of batches; everybody else's is 0, and a lower number comes first. Deadlines lower it, to 1.
PRIORITY = 10
URGENT = 1
#: Of the requests that a replica runs: so many more may wait, so that it never runs dry and shows
#: whether it could run them, too; and how many at least.
SPARE, FEWEST = 0.5, 16
#: While others are asking, batches leave this share of an engine's usual load to them.
RESERVED = 0.5


def room(
    endpoint: EndpointStatus, replicas: Collection[ReplicaReport], online: int, priority: int
) -> int:
    """How many requests of batches the endpoint can have under way, over all batches.

    `online`: requests of others that are under way. `priority`: of the batch that asks; an urgent
    one may fill the queue, so that the endpoint grows if it can.
    """
    ready = len(replicas)
    if not ready:
        return 1  # it sleeps, or starts: one request is enough to wake it
    if priority <= URGENT:
        return max(1, ready * endpoint.max_queue // 2)
    usual = int(ready * endpoint.target_queue_depth)
    if online:
        return max(1, min(int(usual * (1 - RESERVED)), usual - online))
    if ready < endpoint.max_replicas:
        return max(1, usual)  # more would start replicas for work that nobody waits for
    running = sum(report.load.running for report in replicas)
    return min(running + max(FEWEST * ready, int(running * SPARE)), ready * endpoint.max_queue // 2)
