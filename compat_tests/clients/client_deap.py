"""DEAP: a genetic algorithm, genetic programming and a hall of fame, evaluated by toolbox.map."""

import operator
import random
from typing import Any

from deap import algorithms, base, creator, gp, tools

from compat_tests.clients.doors import Doors, worked, workload

creator.create("Best", base.Fitness, weights=(1.0,))
creator.create("Least", base.Fitness, weights=(-1.0,))
creator.create("Bits", list, fitness=creator.Best)
creator.create("Tree", gp.PrimitiveTree, fitness=creator.Least)

_primitives = gp.PrimitiveSet("main", 1)
for _operator in (operator.add, operator.sub, operator.mul):
    _primitives.addPrimitive(_operator, 2)
_primitives.addPrimitive(operator.neg, 1)
_primitives.addTerminal(1)


def ones(individual: Any) -> tuple[int]:
    worked()
    return (sum(individual),)


def error(individual: Any) -> tuple[float]:
    worked()
    function = gp.compile(individual, _primitives)
    return (sum((function(x / 10) - (x / 10) ** 2 - x / 10) ** 2 for x in range(-10, 10)),)


def _evolve_bits(mapping: Any) -> Any:
    random.seed(64)
    toolbox = base.Toolbox()
    toolbox.register("bit", random.randint, 0, 1)
    toolbox.register("individual", tools.initRepeat, creator.Bits, toolbox.bit, 40)
    toolbox.register("population", tools.initRepeat, list, toolbox.individual)
    toolbox.register("evaluate", ones)
    toolbox.register("mate", tools.cxTwoPoint)
    toolbox.register("mutate", tools.mutFlipBit, indpb=0.05)
    toolbox.register("select", tools.selTournament, tournsize=3)
    toolbox.register("map", mapping)
    best = tools.HallOfFame(3)
    population, log = algorithms.eaSimple(toolbox.population(n=60), toolbox, 0.5, 0.2, 12, halloffame=best,
                                          verbose=False)
    return [list(one) for one in best], [list(one) for one in population], [dict(line) for line in log]


@workload
def with_pool(doors: Doors) -> Any:
    with doors.Pool() as pool:
        return _evolve_bits(pool.map)


@workload
def with_executor(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        return _evolve_bits(executor.map)


@workload
def programs(doors: Doors) -> Any:
    random.seed(65)
    toolbox = base.Toolbox()
    toolbox.register("expr", gp.genHalfAndHalf, pset=_primitives, min_=1, max_=2)
    toolbox.register("individual", tools.initIterate, creator.Tree, toolbox.expr)
    toolbox.register("population", tools.initRepeat, list, toolbox.individual)
    toolbox.register("evaluate", error)
    toolbox.register("select", tools.selTournament, tournsize=3)
    toolbox.register("mate", gp.cxOnePoint)
    toolbox.register("mutate", gp.mutUniform, expr=toolbox.expr, pset=_primitives)
    limit = gp.staticLimit(operator.attrgetter("height"), 8)
    toolbox.decorate("mate", limit)
    toolbox.decorate("mutate", limit)
    with doors.Pool() as pool:
        toolbox.register("map", pool.imap, chunksize=5)
        population, _ = algorithms.eaSimple(toolbox.population(n=50), toolbox, 0.5, 0.1, 8, verbose=False)
    return [(str(one), one.fitness.values) for one in population]
