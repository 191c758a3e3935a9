"""A forecast as data: what a pruner would leave of a model."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from typing import Any

from gsprune.forecast.rule_plan import Cost, Entry, RulePlan
from gsprune.forecast.show import lines, summary
from gsprune.text.display import html_table
from gsprune.text.table import terminal_width

__all__ = ["Cost", "Entry", "PruningPlan", "RulePlan"]


@dataclass(frozen=True, repr=False)
class PruningPlan:
    """What a pruner would leave in the end; numbers only, nothing refers to the model.

    rules           the plan of each, as if it were alone
    dense, pruned   cost of the whole model now, and when all units are cut out; `pruned` is None where scores decide it
    input           shapes of the example input, which the MACs are of, as "1x3x224x224"

    Its `repr` is a table for a terminal, and a notebook shows it as one.
    """

    rules: tuple[RulePlan, ...]
    dense: Cost
    pruned: Cost | None
    input: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers: those of the only rule, or `rules`, `dense` and `pruned`."""
        if len(self.rules) == 1:
            return self.rules[0].to_json() | {"input": self.input}
        pruned = None if self.pruned is None else asdict(self.pruned)
        rules = [rule.to_json() for rule in self.rules]
        return {"rules": rules, "dense": asdict(self.dense), "pruned": pruned, "input": self.input}

    def lines(self, *, width: int | None = None) -> list[str]:
        """What there is to say, as lines of at most so many columns as far as the numbers allow; None: the terminal's.

        Entries alike but for a number in their name share a row, as "blocks.{0-11}.attn", and a table of more than 24
        rows leaves out its middle; `to_json` has everything. "+2" after a structure's name: its units are those of two
        more layers.
        """
        return lines(self.rules, self.dense, self.pruned, self.input, width=width or terminal_width())

    def __repr__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        parts = []
        for title, head, rows, notes in summary(self.rules, self.dense, self.pruned, self.input):
            parts += [f"<p>{html.escape(text)}</p>" for text in title]
            parts += [html_table(head, [row for row in rows if row])] if head else []
            parts += [f"<p>{html.escape(text)}</p>" for text in notes]
        return "".join(parts)
