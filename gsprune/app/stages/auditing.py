"""The auditing stage (`audit=true`): whether the scores that a job prunes by say what removal does to the loss.

It looks at the dense network, before anything is pruned: there the scores rank all units, and of a pruned network only
those that the scores have kept are left. It is skipped where its rows are on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gsprune import collectives
from gsprune.app.configuration import check_switch
from gsprune.app.cut_settings import is_cut, rules_of, settings_of, single_weights
from gsprune.app.stages.checkpoint import Dense
from gsprune.app.stages.context import load_or_compute
from gsprune.app.stages.cutting import cross_entropy
from gsprune.app.stages.setup import Setup
from gsprune.app.stages.training import Training
from gsprune.criteria import Criterion, Magnitude, Random
from gsprune.cutting.audit import Audit, audit
from gsprune.cutting.calibration import Calibration
from gsprune.files.disk import read_object, write_json
from gsprune.plots.audit_figures import plot_audit
from gsprune.pruner.rule import Rule
from gsprune.text.display import logger

log = logger(__name__)
RECORD = "checkpoint/audit.json"
PICTURE = "figures/audit.png"
SECONDS = 60.0  # of removing units, after which no other is removed


def is_audited(cfg: Any) -> bool:
    """Whether `audit=true` is set, and there is a pruner to audit.

    Raises:
        ValueError: it is neither true nor false.
    """
    return check_switch(cfg, "audit") and not str(cfg.pruner.get("_target_")).endswith(".no_pruning")


def audited_rules(cfg: Any, pruner: Any) -> list[Rule]:
    """The rules of a job that prune units: of `mode=cut` those of its configuration, else the pruner's.

    Raises:
        ValueError: none of them does.
    """
    if is_cut(cfg):
        rules = [] if single_weights(cfg) is not None else rules_of(cfg.pruner)
    else:
        rules = [rule for rule in getattr(pruner, "rules", ()) if rule.units]
    if not rules:
        raise ValueError(
            "audit=true removes single units, and this pruner scores none: take one of units, such as pruner=abs, "
            "weighted or fisher, or audit=false"
        )
    return rules


def check_audit(cfg: Any, setup: Setup, pruner: Any) -> None:
    """Refuse an audit that cannot be done, before anything is trained.

    Raises:
        ValueError: no rule prunes units, there are fewer than two samples, or a batch has no finite loss.
    """
    if not is_audited(cfg):
        return
    audited_rules(cfg, pruner)
    if (samples := settings_of(cfg).calibration) < 2:
        raise ValueError(
            f"audit=true scores on some samples and measures on others: cut.calibration={samples} must be 2 or more"
        )
    try:
        Calibration(setup.data.val, cross_entropy, samples=2).dense_loss(setup.model)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"audit=true needs the loss of a batch, and that cannot be computed: {error}") from error


def audit_scores(training: Training, dense: Dense, pruner: Any) -> None:
    """Audit the criteria of the job and two baselines on the dense network, into the result; the first process does it.

    Args:
        pruner: of the job; None with `mode=cut`.
    """
    job = training.job
    if not is_audited(job.cfg):
        if check_switch(job.cfg, "audit") and job.first:
            log.info("pruner=none scores nothing: there is nothing to audit")
        return
    if not job.first:
        return
    of = {"config_hash": job.result["config_hash"], "dense": dense.sha256}

    def load() -> dict[str, Any] | None:
        found = read_object(job.folder / RECORD)
        known = found.get("of") == of and None not in of.values() and training.setup.trainer.resume != "never"
        return found["audit"] if known else None

    def store(told: dict[str, Any]) -> None:
        job.writer.write(RECORD, lambda: write_json(job.folder / RECORD, {"of": of, "audit": told}))

    told, _ = load_or_compute(load, lambda: _audited(training, audited_rules(job.cfg, pruner)), store)
    job.result["audit"] = told
    sizes = [(row["criterion"], row["kind"], row["size"]) for row in told["rows"] if row["size"] is not None]
    job.numbers |= {f"audit/{criterion}/{kind}": size[0] for criterion, kind, size in sizes}
    with job.watch.part("files"):
        job.writer.write(PICTURE, lambda: plot_audit(sizes).save(job.folder / PICTURE))


def _audited(training: Training, rules: Sequence[Rule]) -> dict[str, Any]:
    job, setup = training.job, training.setup
    setup.seed(2)  # as for scoring
    try:
        with job.watch.part("measure"), collectives.alone():
            found = audit(
                setup.model,
                setup.data.train,
                cross_entropy,
                criteria=_criteria(rules),
                calibration=settings_of(job.cfg).calibration,
                seconds=SECONDS,
                example_input=setup.traced,
                progress=job.progress.part,
                **_names(rules),
            )
    finally:
        job.progress.part("", 1.0)
    log.info("%s", found)
    return _told(found)


def _criteria(rules: Sequence[Rule]) -> list[Criterion]:
    """Those of the rules, each once, and two baselines.

    >>> from gsprune.criteria import Abs
    >>> _criteria([Rule(Abs(), kinds=["heads"]), Rule(Abs(), kinds=["neurons"])])
    [Abs(decay=0.95, normalize=None), Magnitude(decay=1.0), Random(decay=1.0, seed=0)]
    """
    mine = {repr(rule.criterion): rule.criterion for rule in rules}
    baselines: dict[type[Criterion], Criterion] = {type(c): c for c in (Magnitude(), Random())}
    for criterion in mine.values():
        baselines.pop(type(criterion), None)
    return [*mine.values(), *baselines.values()]


def _names(rules: Sequence[Rule]) -> dict[str, Any]:
    """What of the network is audited: what the one rule prunes; of several rules, all of their kinds."""
    named = [[*(rule.kinds or rule.counts)] for rule in rules]
    kinds = list(dict.fromkeys(kind for some in named for kind in some)) if all(named) else None
    alone = {"include": rules[0].include, "exclude": rules[0].exclude} if len(rules) == 1 else {}
    return {"kinds": kinds, **alone}


def _told(found: Audit) -> dict[str, Any]:
    """What result.json holds of an audit: without the single removals."""
    told = found.to_json()
    return {"units": len(found.removals), **{name: told[name] for name in told if name not in ("removals", "scores")}}
