"""What a run is asked for."""

from dataclasses import dataclass
from typing import Any

from mpocompress.errors import DataError
from mpocompress.export.forms import FormChoice
from mpocompress.export.quantize import Quantize
from mpocompress.planning import LayoutChoice, ObjectiveName, Of

# Options that make a plan, as `plan_options` has them; `batch` is for the forms in the file, too.
_DECIDED_BY_PLANS = (
    *("bond_dim", "ratio", "max_size", "max_error", "max_drop"),
    *("of", "objective", "layout", "sites", "include", "exclude"),
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for; see its help for the meaning of each."""

    plan: str | None = None
    bond_dim: int | None = None
    ratio: float | None = None
    max_size: str | None = None
    max_error: float | None = None
    max_drop: float | None = None
    of: Of = "model"
    objective: ObjectiveName = "size"
    batch: int = 1
    layout: LayoutChoice = "auto"
    sites: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    data: str | None = None
    inputs: tuple[str, ...] = ()
    factory: str | None = None
    trust_pickle: bool = False
    sweeps: int | None = None
    distill: int = 0
    form: FormChoice = "auto"
    quantize: Quantize = "none"
    onnx: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.distill and self.data is None:
            raise DataError(
                f"--distill {self.distill} trains on data, and there is none. Add --data, with "
                "batches for the model; labels are not needed."
            )
        if self.sweeps is not None and self.data is None:
            raise DataError(
                f"--sweeps {self.sweeps} are passes of a fit to data, and there is none. Add "
                "--data, with batches for the model; labels are not needed."
            )
        measured = {"--max-error": self.max_error, "--max-drop": self.max_drop}
        budget = next((name for name, value in measured.items() if value is not None), None)
        if budget is not None and self.quantize in ("int8", "int4"):
            raise DataError(
                f"{budget} {measured[budget]:g} is measured on float32 cores, and --quantize "
                f"{self.quantize} would round them afterwards. Take one of them: after {budget}, "
                f"'mpocompress export DIR --source MODEL --quantize {self.quantize}' writes the "
                "rounded file, and 'mpocompress verify' says what that costs."
            )
        if self.plan is not None:
            self._check_with_plan(self.plan)
        if not self.onnx:
            self.check_without_onnx("--no-onnx writes none")

    def _check_with_plan(self, plan: str) -> None:
        decided = {
            f"--{name.replace('_', '-')}": getattr(self, name)
            for name in _DECIDED_BY_PLANS
            if getattr(self, name) != getattr(Request, name)
        }
        if self.quantize == "auto":
            decided["--quantize"] = "auto"
        if decided:
            raise DataError(
                f"--plan {plan} says what becomes of each layer, so {' and '.join(decided)} would "
                "not be looked at. Give the plan alone, edited as you like, or these options alone."
            )

    def check_for_graph(self) -> None:
        """Refuse what an ONNX graph cannot be given.

        Raises:
            DataError: a budget that is measured on models, healing, or another form or precision.
        """
        chosen = {
            "--max-size": self.max_size,
            "--max-error": self.max_error,
            "--max-drop": self.max_drop,
            "--distill": self.distill or None,
            "--quantize": None if self.quantize == "none" else self.quantize,
            "--form": None if self.form in ("auto", "chain") else self.form,
            "--objective": None if self.objective != "latency" else self.objective,
            "--no-onnx": None if self.onnx else "",
        }
        given = next((name for name, value in chosen.items() if value is not None), None)
        if given is None:
            return
        why = "trains with gradients, which an ONNX graph does not have"
        raise DataError(
            f"{f'{given} {chosen[given]}'.rstrip()} "
            f"{why if given == '--distill' else 'is for PyTorch models'}. "
            "An ONNX graph takes --bond-dim, --ratio or --plan, and is written with float32 "
            f"chains. Drop {given}, or compress the PyTorch model that the file was made of."
        )

    def check_without_onnx(self, why: str) -> None:
        """Refuse what only an ONNX file can have, where none is written.

        Raises:
            DataError: a form, a precision, or a size.
        """
        for name, value, default in (
            ("--form", self.form, "auto"),
            ("--quantize", self.quantize, "none"),
            ("--max-size", self.max_size, None),
        ):
            if value != default:
                raise DataError(f"{name} {value} is for the ONNX file: {why}. Or drop {name}.")

    @property
    def fit_options(self) -> dict[str, Any]:
        """`sweeps`, where it is given."""
        return {} if self.sweeps is None else {"sweeps": self.sweeps}

    def plan_options(self) -> dict[str, Any]:
        """What `plan` and `compress` are to be called with."""
        return {
            "bond_dim": self.bond_dim,
            "ratio": self.ratio,
            "max_size": self.max_size,
            "max_error": self.max_error,
            "max_drop": self.max_drop,
            "of": self.of,
            "objective": self.objective,
            "batch": self.batch,
            "layout": self.layout,
            "sites": self.sites,
            "include": self.include,
            "exclude": self.exclude,
            "quantize": "auto" if self.quantize == "auto" else "none",
        }
