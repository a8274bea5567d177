"""Mixture of experts on text: against dense, upcycled, pruned, and the law of sparsity.

`python -m experiments.moe_lm --help` for the options. Four parts, each of which can run alone:
`compare` (equal active FLOPs), `upcycle` (equal extra compute), `prune` (all experts down to one),
`law` (a grid of tiny models). A run that is finished is not run again, and one that was stopped
goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.allocator import keep_freed_memory
from experiments.expert_pruning import curve
from experiments.log import make_console
from experiments.loop import Interrupted, write_json
from experiments.moe_costs import costs
from experiments.moe_lm_report import write_report
from experiments.moe_training import (
    Plan,
    Trained,
    flops,
    held_out,
    make_arm,
    parameters,
    train,
)
from experiments.sparsity_law import CHOSEN, fits, law_config
from experiments.text import BUNDLED, Text, batches, load
from jaxsparse import moe
from models import transformer
from models.moe import Config

PARTS = ("compare", "upcycle", "prune", "law")
COPIES = {f"layers/moe/{name}": f"layers/mlp/{name}/kernel" for name in ("gate", "up", "down")}
COPIES["layers/moe_norm/scale"] = "layers/mlp_norm/scale"


@dataclasses.dataclass(frozen=True)
class Options:
    """Small language models of experts beside dense ones."""

    out: Path = Path("runs/moe_lm")
    """Directory of the runs; the same command goes on from what is in it."""
    parts: tuple[str, ...] = PARTS
    """Which of compare, upcycle, prune, law; tables hold what was run here before, too."""
    seeds: int = 2
    """Runs of compare and upcycle, of weights and data."""
    width: int = 64
    """Of the models of compare, upcycle and prune; two layers."""
    hidden: int = 48
    """Of one expert, and of the shared one; the dense model has as much as a token sees."""
    experts: int = 16
    """Of compare and prune."""
    chosen: int = 3
    """Experts a token, beside the shared one."""
    copies: int = 8
    """Experts of an upcycled layer, each as wide as the dense one; a token takes two."""
    steps: int = 500
    """Of compare, and of the dense model that upcycle starts from."""
    extra: int = 300
    """Steps that the dense model goes on for; others get as many FLOPs."""
    law_widths: tuple[int, ...] = (16, 32, 64)
    """Of the grid of law."""
    law_experts: tuple[int, ...] = (2, 4, 8, 16)
    """Of the grid of law; a token takes two, so sparsity is 1 - 2 / experts."""
    law_steps: tuple[int, ...] = (120, 240, 480)
    """Of the grid of law; every number is a run of its own, with its own decay of the rate."""
    context: int = 64
    """Bytes a model sees."""
    batch: int = 16
    """Windows of a step."""
    learning_rate: float = 5e-3
    """Of the matrices at width 64; see `experiments/moe_training.py`."""
    limit: int = 512
    """Held-out windows measured."""
    data: Path = BUNDLED
    """The text."""

    def __post_init__(self) -> None:
        """Raise ValueError on what cannot be run."""
        if unknown := set(self.parts) - set(PARTS):
            raise ValueError(f"--parts must be some of {', '.join(PARTS)}; got {sorted(unknown)}.")
        for name in ("seeds", "width", "hidden", "experts", "copies", "steps", "extra", "limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1; got {getattr(self, name)}.")
        if min(self.law_experts) < CHOSEN:
            raise ValueError(f"--law-experts must be at least {CHOSEN}; got {self.law_experts}.")


@cache
def configs(options: Options) -> dict[str, transformer.Config]:
    """Models of compare and upcycle by name."""
    shape: dict[str, Any] = {
        "width": options.width,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_width": 32,
        "context": options.context,
    }
    experts = Config(
        hidden=options.hidden,
        shared=options.hidden,
        experts=options.experts,
        chosen=options.chosen,
        router=moe.token_choice(options.chosen),
        **shape,
    )
    dense = experts.active
    upcycled = Config(
        hidden=dense.hidden,
        shared=0,
        experts=options.copies,
        chosen=min(2, options.copies),
        router=moe.token_choice(min(2, options.copies)),
        **shape,
    )
    wide = dataclasses.replace(dense, hidden=(options.experts + 1) * options.hidden)
    return {"dense": dense, "experts": experts, "wide dense": wide, "upcycled": upcycled}


class Runs:
    """Trains by options, and reads what was trained before."""

    def __init__(self, options: Options, console: Any) -> None:
        self.options, self.console = options, console
        self.text: Text = load(options.data, context=options.context)

    def train(self, name: str, config: transformer.Config, plan: Plan, **more: Any) -> Trained:
        """See `moe_training.train`."""
        o = self.options
        return train(
            config,
            plan,
            self.text,
            o.out / name,
            self.console,
            learning_rate=o.learning_rate,
            batch=o.batch,
            limit=o.limit,
            **more,
        )

    def arm(self, config: transformer.Config) -> Any:
        """See `make_arm`."""
        return make_arm(config, self.options.learning_rate)


def quarters(steps: int) -> tuple[int, ...]:
    """After each quarter."""
    return tuple(steps * i // 4 for i in (1, 2, 3, 4))


def compare(runs: Runs) -> dict[str, Any]:
    """Dense, experts of equal active FLOPs, and dense of as many parameters: quality and cost."""
    options, found = runs.options, {}
    models = {name: configs(options)[name] for name in ("dense", "experts", "wide dense")}
    for name, config in models.items():
        results = [
            runs.train(
                f"compare/{name}-{seed}",
                config,
                Plan(seed, options.steps, marks=quarters(options.steps)),
            ).result
            for seed in range(options.seeds)
        ]
        found[name] = {
            "bits_per_byte": [result["bits_per_byte"] for result in results],
            "marks": [result["marks"] for result in results],
            "parameters": parameters(config),
            "flops": flops(config),
        }
    return with_times(runs, models, found)


def with_times(runs: Runs, models: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Adds the time of a train step, and what serving costs."""
    runs.console.print("measuring train steps and serving, all models in turns")
    arms = {name: runs.arm(config) for name, config in models.items()}
    shape = {"context": runs.options.context, "batch": runs.options.batch}
    tokens = jnp.asarray(batches(runs.text.train, seed=0, **shape)[0])
    for name, times in costs(models, arms, tokens).items():
        found[name] |= times
    return found


def upcycle(runs: Runs) -> dict[str, Any]:
    """A dense model goes on, dense or as experts, with equal FLOPs; and experts from scratch."""
    options = runs.options
    dense, experts = configs(options)["dense"], configs(options)["upcycled"]
    share = flops(dense) / flops(experts)
    found: dict[str, Any] = {"before": [], "arms": {}}
    arms: dict[str, list] = {}
    for seed in range(options.seeds):
        base = runs.train(f"upcycle/base-{seed}", dense, Plan(seed, options.steps, decay=False))
        found["before"].append(base.result["bits_per_byte"])
        names = ("dense, continued", "upcycled", "upcycled, with optimizer state")
        begin = dict(zip(names, starts(runs, base, experts, seed), strict=True))
        begin["experts from scratch"] = None
        for name, start in begin.items():
            config = dense if name.startswith("dense") else experts
            steps = options.extra if config is dense else max(4, round(options.extra * share))
            plan = Plan(seed, steps, first=options.steps, marks=quarters(steps))
            result = runs.train(
                f"upcycle/{name}-{seed}", config, plan, begin=start, start=name
            ).result
            arms.setdefault(name, []).append(result)
    for name, results in arms.items():
        found["arms"][name] = {
            "bits_per_byte": [result["bits_per_byte"] for result in results],
            "marks": [result["marks"] for result in results],
            "steps": results[0]["marks"][-1][0],
            "flops": results[0]["flops"],
            "parameters": results[0]["parameters"],
        }
    found["costs"] = with_times(
        runs, {"dense": dense, "upcycled": experts}, {"dense": {}, "upcycled": {}}
    )
    return found


def starts(runs: Runs, base: Trained, experts: Any, seed: int) -> list[Any]:
    """Where the three that go on begin: functions to (parameters, optimizer)."""
    arm = runs.arm(experts)

    def same(params, state):
        return params, state

    def fresh(params, state):
        new = moe.upcycle(params, arm.init(seed)[0], COPIES)
        return new, arm.tx.init(new)

    def with_state(params, state):
        new, begin = fresh(params, state)
        return new, moe.upcycle_state(state, begin, params, new, COPIES)

    def begin(make):
        # Copies: steps donate what they are given, and the others still need it.
        make_copies = jax.jit(lambda p, s: jax.tree.map(jnp.copy, make(p, s)))
        return lambda: make_copies(base.params, base.state)

    return [begin(make) for make in (same, fresh, with_state)]


def prune(runs: Runs) -> dict[str, Any]:
    """Held-out loss with fewer and fewer of the trained experts, without further training."""
    options = runs.options
    config = configs(options)["experts"]
    plan = Plan(0, options.steps, marks=quarters(options.steps))
    trained = runs.train("compare/experts-0", config, plan)
    tokens = batches(runs.text.train, context=options.context, batch=64, seed=1)[0]
    measured = held_out(runs.text, options.context, min(256, options.limit))
    return curve(config, trained.params, jnp.asarray(tokens[:, :-1]), measured)


def law(runs: Runs) -> dict[str, Any]:
    """Loss over parameters N, bytes D and sparsity S, and three laws fitted to it."""
    options, points = runs.options, []
    for width in options.law_widths:
        dense = law_config(width, CHOSEN, options.context)
        for experts in options.law_experts:
            config = law_config(width, experts, options.context)
            for steps in options.law_steps:
                result = runs.train(f"law/{width}-{experts}-{steps}", config, Plan(0, steps)).result
                points.append(
                    {
                        "width": width,
                        "experts": experts,
                        "N": parameters(config, blocks=True),
                        "active": parameters(dense, blocks=True),
                        "D": result["tokens"],
                        "1-S": CHOSEN / experts,
                        "loss": result["bits_per_byte"] * float(np.log(2)),
                    }
                )
    return {"points": points, "fits": fits(points, max(options.law_experts))}


def main(arguments: list[str] | None = None) -> int:
    """Run what is not done yet; returns the exit status."""
    console = make_console()
    try:
        options = tyro.cli(Options, args=arguments, prog="python -m experiments.moe_lm")
        runs, summary = Runs(options, console), options.out / "summary.json"
        found = json.loads(summary.read_text()) if summary.exists() else {}
        todo = {"compare": compare, "upcycle": upcycle, "prune": prune, "law": law}
        for part in options.parts:
            found[part] = todo[part](runs)
            found.setdefault("settings", {})[part] = settings(options)
            write_json(summary, found)
    except Interrupted as stop:
        console.print(f"Stopped after step {stop.step}; the same command goes on from there.")
        return 130
    except (ValueError, FloatingPointError) as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    console.print(write_report(options.out, found), markup=False, highlight=False)
    return 0


def settings(options: Options) -> dict[str, Any]:
    """What a part was run with and on."""
    return {
        **json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "python": platform.python_version(),
        "jax": version("jax"),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    sys.exit(main())
