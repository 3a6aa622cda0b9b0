"""State of a search: the configurations of each round, and the decisions at rungs.

A random search is one round. Every decision that depends on results is written first (``decisions``).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from modis_dist.config.parse import digest
from modis_dist.config.study import OptunaSearch, Study
from modis_dist.execution.trial import Trial
from modis_dist.report.study_results import Group, Params
from modis_dist.study.aggregate import Configuration, Verdict
from modis_dist.study.manifest import expand
from modis_dist.study.search.decisions import JsonObject, record_decision, stored_decision
from modis_dist.study.search.halving import verdicts
from modis_dist.study.search.tpe import Outcome, proposals

Groups = Mapping[Configuration, Sequence[Trial]]
Proposal = Mapping[str, Sequence[Params]]  # condition -> configurations of a round


class RungVerdict(Verdict):
    """The verdict on a group at a rung, with the group."""

    condition: str
    params: Params


class RungDecision(TypedDict):
    """The decision about groups at a rung: a verdict on each, and the crash reasons of trials by id."""

    verdicts: list[RungVerdict]
    failed: dict[str, str]


class SearchState:
    """The known rounds and the pruned configurations of a search; ``propose`` decides the next round."""

    def __init__(self, study: Study, fingerprint: str, *, out: Path, source: str) -> None:
        self._study = study
        self._fingerprint = fingerprint
        self._out = out
        self._source = source
        self._proposed: list[Proposal] = []  # of the rounds after the first
        self.pruned: dict[Configuration, Verdict] = {}
        self._expand()
        while self.known_rounds < self.total_rounds:
            stored = stored_decision(out, self._next_round_subject())
            if stored is None:
                break
            self._proposed.append(stored)
            self._expand()

    @property
    def known_rounds(self) -> int:
        """Return the number of known rounds."""
        return 1 + len(self._proposed)

    @property
    def total_rounds(self) -> int:
        """Return the number of rounds of the whole search."""
        search = self._study.sweep.search
        return -(-search.configurations // search.round_size) if isinstance(search, OptunaSearch) else 1

    @property
    def remaining_rounds(self) -> float:
        """Return the number of rounds that are not known yet; the last may be fractional."""
        search = self._study.sweep.search
        if not isinstance(search, OptunaSearch):
            return 0.0
        return max(0.0, search.configurations / search.round_size - self.known_rounds)

    def round(self, number: int) -> list[Trial]:
        """Return the trials of a round, from 0, without those of configurations of earlier rounds."""
        search = self._study.sweep.search
        size = search.round_size if isinstance(search, OptunaSearch) else len(self.trials) + 1
        return [trial for trial in self.trials if trial.configuration // size == number]

    def propose(self, groups: Sequence[Group]) -> None:
        """Decide and record the next round of every condition from its groups in all rounds before."""
        search, sweep = self._study.sweep.search, self._study.sweep
        assert isinstance(search, OptunaSearch) and self.known_rounds < self.total_rounds
        outcomes: dict[str, list[Outcome]] = {}
        for group in groups:
            outcomes.setdefault(group["condition"], []).append(_outcome(group))
        configurations = {
            condition: proposals(
                sweep.space,
                known,
                count=search.round_size,
                seed=search.seed,
                number=self.known_rounds,
                metric=self._study.trainer.metric,
            )
            for condition, known in outcomes.items()
        }
        self._proposed.append(record_decision(self._out, self._next_round_subject(), configurations))
        self._expand()

    def _next_round_subject(self) -> JsonObject:
        sweep = self._study.sweep
        search = sweep.search
        assert isinstance(search, OptunaSearch)
        return {
            "round": self.known_rounds,
            "search": search.model_dump(mode="json", exclude={"configurations"}),  # their number changes no round
            "space": {key: dimension.model_dump(mode="json") for key, dimension in sweep.space.items()},
            "trials": digest([[trial.condition, trial.id] for trial in self.trials]),
        }

    def _expand(self) -> None:
        self.trials = expand(self._study, self._fingerprint, source=self._source, proposed=self._proposed)

    def rungs(self, trials: Sequence[Trial]) -> list[int]:
        """Return the epochs at which these trials are compared; none if the study does not prune."""
        pruning = self._study.sweep.pruning
        max_epochs = {trial.run.optim.epochs for trial in trials}
        return sorted({rung for epochs in max_epochs for rung in pruning.rungs(epochs=epochs)}) if pruning else []

    def stored_rung_decision(self, groups: Groups, epoch: int) -> RungDecision | None:
        """Return the recorded decision about groups at a rung, with verdicts in their order, or None."""
        decision: RungDecision | None = stored_decision(self._out, self._rung_subject(groups, epoch))
        return decision

    def decide_rung(
        self, groups: Groups, epoch: int, values: Mapping[str, float | None], failed: Mapping[str, str]
    ) -> RungDecision:
        """Decide about groups at a rung, for each condition separately, and record the decision.

        ``failed`` has the reasons of crashed trials by id.
        """
        pruning = self._study.sweep.pruning
        assert pruning is not None
        by_group: dict[Configuration, Verdict] = {}
        for condition in dict.fromkeys(condition for condition, _ in groups):
            compared = {key: [values[t.id] for t in trials] for key, trials in groups.items() if key[0] == condition}
            values_of_groups = list(compared.values())
            ranked = verdicts(values_of_groups, epoch=epoch, factor=pruning.factor, metric=self._study.trainer.metric)
            by_group |= dict(zip(compared, ranked, strict=True))
        rows: list[RungVerdict] = [{"condition": k[0], "params": groups[k][0].params, **by_group[k]} for k in groups]
        decision: RungDecision = {"verdicts": rows, "failed": dict(failed)}
        written: RungDecision = record_decision(self._out, self._rung_subject(groups, epoch), decision)
        return written

    def _rung_subject(self, groups: Groups, epoch: int) -> JsonObject:
        pruning = self._study.sweep.pruning
        assert pruning is not None
        members = [[condition, [trial.id for trial in trials]] for (condition, _), trials in groups.items()]
        return {"rung": epoch, "factor": pruning.factor, "groups": digest(members)}


def _outcome(group: Group) -> Outcome:
    complete = group["n"] == group["expected"] and not group["failed"]
    pruned = group["pruned"]
    return Outcome(group["params"], group["mean"] if complete else None, pruned and pruned["epoch"])
