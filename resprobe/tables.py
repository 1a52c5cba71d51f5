"""What the tables of studies have in common: how networks are called, and the columns that most of them have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resprobe.claims import mean_std

if TYPE_CHECKING:
    from resprobe.study import Results


def network_name(kind: str, depth: int | None) -> str:
    """The name by which people know a network of a kind (`NetworkSpec.kind`) and depth: "plain-20", "ResNet-20", "VGG-16"."""
    name = "ResNet" if kind == "residual" else kind
    return name if depth is None else f"{name}-{depth}"


def size_column(results: Results, **labels: Any) -> dict[str, str]:
    """The column with the parameters of the network whose runs have these labels."""
    return {"parameters": f"{results.values('parameters', **labels)[0]:,.0f}"}


def error_columns(results: Results, **labels: Any) -> dict[str, str]:
    """The columns with the final training and test errors of the runs with these labels, over seeds."""
    columns = {"training error (%)": "train_error", "test error (%)": "test_error"}
    return {title: mean_std(results.values(column, **labels)) for title, column in columns.items()}


def effort_columns(results: Results, **labels: Any) -> dict[str, Any]:
    """The columns with how many runs have these labels, and how long one took."""
    seconds = results.values("seconds", **labels)
    return {"seeds": len(seconds), "s a run": f"{sum(seconds) / len(seconds):,.0f}"}
