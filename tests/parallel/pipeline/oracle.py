"""Slow twins that are obviously right: random valid schedules, a replay in fractions, and a run of programs one by
one.
"""

import random
from fractions import Fraction

from parallel.pipeline.actions import Action, Op, Program, Schedule, depends_on
from parallel.pipeline.simulate import Costs

PLACEMENTS = {
    "one way": lambda p: (tuple(range(p)),),
    "loop": lambda p: (tuple(range(p)) * 2,),
    "v": lambda p: ((*range(p), *reversed(range(p))),),
    "both ways": lambda p: (tuple(range(p)), tuple(reversed(range(p)))),
}


def random_schedule(shape: str, num_ranks: int, num_microbatches: int, seed: int) -> Schedule:
    """A valid schedule: in a random order, actions run whose needs have run; some of them as pairs, some backwards
    split.
    """
    rng = random.Random(seed)
    placement = PLACEMENTS[shape](num_ranks)
    every = [(stage, mb) for stage in range(len(placement[0])) for mb in range(num_microbatches)]
    split = {key for key in every if rng.random() < 0.5}
    # An empty program per rank knows the placement; its `split_backwards` is filled in by hand.
    blank = Schedule("random", [[] for _ in range(num_ranks)], placement, num_microbatches)
    blank.__dict__["split_backwards"] = frozenset(split)
    waiting = [Action(stage, Op.F, mb) for stage, mb in every]
    for stage, mb in every:
        waiting += [Action(stage, op, mb) for op in ((Op.I, Op.W) if (stage, mb) in split else (Op.B,))]
    done: set[Action] = set()
    programs: list[Program] = [[] for _ in range(num_ranks)]
    while waiting:
        ready = [action for action in waiting if done.issuperset(depends_on(action, blank))]
        action = rng.choice(ready)
        slot = (action,)
        rank = blank.rank_of(action.stage, action.mb)
        if action.op is Op.F and rng.random() < 0.7:
            partners = [a for a in ready if a.op in (Op.B, Op.I) and blank.rank_of(a.stage, a.mb) == rank]
            slot += tuple(partners[:1])
        programs[rank].append(slot)
        for ran in slot:
            done.add(ran)
            waiting.remove(ran)
    return Schedule("random", programs, placement, num_microbatches)


def is_valid(schedule: Schedule) -> bool:
    """Whether every action is there once, on its rank, and all can run, each rank in its order."""
    actions = [(rank, a) for rank, program in enumerate(schedule.programs) for slot in program for a in slot]
    found = sorted(a for _, a in actions)
    wanted = []
    for stage in range(schedule.num_stages):
        for mb in range(schedule.num_microbatches):
            ops = (Op.I, Op.W) if (stage, mb) in schedule.split_backwards else (Op.B,)
            wanted += [Action(stage, op, mb) for op in (Op.F, *ops)]
    if found != sorted(wanted) or any(schedule.rank_of(a.stage, a.mb) != rank for rank, a in actions):
        return False
    at = [0] * schedule.num_ranks
    done: set[Action] = set()
    progress = True
    while progress:
        progress = False
        for rank, program in enumerate(schedule.programs):
            if at[rank] < len(program):
                slot = program[at[rank]]
                if all(done.issuperset(depends_on(a, schedule)) for a in slot):
                    done.update(slot)
                    at[rank] += 1
                    progress = True
    return all(at[rank] == len(program) for rank, program in enumerate(schedule.programs))


def slow_replay(schedule: Schedule, costs: Costs) -> dict[Action, tuple[Fraction, Fraction, Fraction]]:
    """(start, end, ready) of every action in exact fractions, by running whatever can run until nothing is left."""
    share = Fraction(schedule.num_ranks, schedule.num_stages)
    f, i, w = (Fraction(getattr(costs, name)) * share for name in "fiw")
    part = {Op.F: f, Op.B: i + w, Op.I: i, Op.W: w}
    squeeze = Fraction(costs.fb) * share / (f + i + w) if costs.fb is not None else Fraction(1)
    times: dict[Action, tuple[Fraction, Fraction, Fraction]] = {}
    at = [0] * schedule.num_ranks
    free = [Fraction(0)] * schedule.num_ranks
    while any(at[rank] < len(program) for rank, program in enumerate(schedule.programs)):
        for rank, program in enumerate(schedule.programs):
            if at[rank] == len(program):
                continue
            slot = program[at[rank]]
            needs = [need for action in slot for need in depends_on(action, schedule)]
            if not times.keys() >= set(needs):
                continue
            away = {need: schedule.rank_of(need.stage, need.mb) != rank for need in needs}
            start = max([free[rank], *(times[n][2] + (Fraction(costs.p2p) if away[n] else 0) for n in needs)])
            factor = Fraction(costs.slow.get(rank, 1)) * (squeeze if len(slot) == 2 else 1)
            end = start + sum(part[action.op] for action in slot) * factor
            before = Fraction(0)
            for action in slot:
                ready = end
                if costs.send_when == "ready":
                    ready = start + (before + (i if action.op is Op.B else part[action.op])) * factor
                times[action] = (start, end, ready)
                before += part[action.op]
            free[rank] = end
            at[rank] += 1
    return times
