"""What `fuse` did to a model, module by module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class FuseReport:
    """Which modules run fused, which do not, and why. `print(report)` lists all; rich renders it as a table.

    Attributes:
        fused: module name -> what is computed in one call.
        skipped: module name -> why it keeps the library's own path.
        unavailable: library name -> why its modules could not be looked at.
    """

    fused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line: how many modules were fused and how many were not."""
        return f"{len(self.fused)} modules fused, {len(self.skipped)} not"

    @property
    def reasons(self) -> str:
        """One line for each module that was not fused and each library that could not be looked at."""
        lines = [f"  not {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines + [f"  {library}: {reason}" for library, reason in self.unavailable.items()])

    def __str__(self) -> str:
        lines = [self.summary, *(f"  {name}: {what}" for name, what in self.fused.items()), self.reasons]
        return "\n".join(filter(None, lines))

    def __rich__(self) -> Table:
        from rich.table import Table  # 10 ms that only those who render pay

        table = Table("module", "fused", "what, or why not", title=self.summary)
        for name, what in self.fused.items():
            table.add_row(name, "yes", what)
        for name, reason in (self.skipped | self.unavailable).items():
            table.add_row(name, "no", reason)
        return table
