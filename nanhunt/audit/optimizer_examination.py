"""One audit of an optimizer: what is measured in which order, and how it is shown."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from nanhunt.audit import optimizer_schedule as schedules
from nanhunt.audit.optimizer_clipping import clipped, clipping_of, effect_of_one_infinity, loss_scale
from nanhunt.audit.optimizer_copies import NoCopy, batch_gradients, guarded, unnoticed
from nanhunt.audit.optimizer_given import Given
from nanhunt.audit.optimizer_roles import groups_of, named_parameters, parameter_facts, rate_of, unwrapped
from nanhunt.audit.optimizer_state import (
    compared,
    groups_in_file,
    is_usable,
    layout_of,
    settings_of,
    state_as_it_stands,
    state_in_file,
    steps_text,
    stored_weights,
)
from nanhunt.audit.optimizer_steps import (
    BUDGET,
    depends_on_size,
    dry_run,
    how_decay_acts,
    moves_without_rate,
    probe_steps,
)
from nanhunt.audit.optimizer_tables import decay_text, groups_table, rates_table, roles_table, run_table
from nanhunt.audit.report import report_of
from nanhunt.errors import first_line
from nanhunt.findings import DataTable, Report, Skip
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import (
    Decay,
    DryRun,
    Gradients,
    GroupFacts,
    GroupSettings,
    OptimizerSetup,
    PlannedRates,
    ScheduleCurve,
    StoredState,
)


class Examination:
    """Measures, and keeps the records and what could not be measured."""

    def __init__(self, given: Given, progress: Callable[[str], None] = lambda what: None) -> None:
        self._given, self._progress = given, progress
        self._started = time.perf_counter()
        self._names = {id(one): name for name, one in named_parameters(given.model).items()}
        self._records: list[Any] = []
        self._skips: list[Skip] = []
        self._facts: list[tuple[str, str]] = []
        self._tables: list[DataTable] = []
        self._gradients: dict[int, Tensor | None] | None = None
        self._source: Gradients = "of unit size"

    def report(self) -> Report:
        """The report of everything that can be measured."""
        given = self._given
        self._progress("the schedule")
        curve = schedules.constant(given.optimizer, given.num_steps)
        with guarded("the schedule's curve", self._skips):
            curve = self._curve()
        rates = [curve.peak(index) for index in range(len(given.optimizer.param_groups))]
        with guarded("the gradients", self._skips):
            self._find_gradients()
        self._progress("the parameter groups")
        setup, may_start, run = None, False, None
        with guarded("the parameter groups", self._skips):
            setup = self._setup(curve, rates)
        self._progress("the optimizer's state")
        with guarded("the optimizer's state", self._skips):
            may_start = self._state()
        self._progress("a step on copies")
        with guarded("a step on copies", self._skips):
            run = self._steps(rates, may_start)
        with guarded("the schedule", self._skips):
            self._schedule(curve)
        with guarded("clipping", self._skips):
            self._clipping()
        with guarded("what stands above the findings", self._skips):
            self._describe(setup, run)
        return report_of(
            given.title,
            self._records,
            facts=self._facts,
            tables=self._tables,
            skips=self._skips,
            seconds=time.perf_counter() - self._started,
        )

    def _curve(self) -> schedules.Curve:
        given = self._given
        if given.scheduler is None:
            self._skips.append(Skip("the schedule's curve", "no schedule was given: the rate is taken to stay"))
            constant = schedules.constant(given.optimizer, given.num_steps)
            # A schedule that nobody has named leaves its mark in the groups.
            if not any(group.get("initial_lr") for group in given.optimizer.param_groups):
                self._planned(constant)
            return constant
        if not schedules.drives(given.scheduler, given.optimizer):
            self._skips.append(Skip("the schedule's curve", "the schedule is of another optimizer"))
            rate = max(rate_of(group) for group in given.optimizer.param_groups)
            kind = type(given.scheduler).__name__
            self._records.append(ScheduleCurve(kind, 1, ((0, rate),), rate, 0, is_own=False))
            return schedules.constant(given.optimizer, given.num_steps)
        try:
            curve = schedules.curve_of(given.scheduler, given.optimizer, given.num_steps)
            self._planned(curve)
        except NoCopy as error:
            self._skips.append(Skip("the schedule's curve", error.message))
            self._planned(None)
            return schedules.constant(given.optimizer, given.num_steps)
        if curve.remark:
            self._skips.append(Skip("the rest of the schedule", curve.remark))
        return curve

    def _planned(self, curve: schedules.Curve | None) -> None:
        """Records the highest rates, as far as the curve begins with the first step, and what groups are scheduled."""
        groups, scheduler = self._given.optimizer.param_groups, self._given.scheduler
        number = schedules.num_scheduled(scheduler) if scheduler is not None else None
        fails = number is not None and number != len(groups)
        is_known = curve is not None and not curve.start
        peaks = [self._peak(curve, index) if curve is not None and is_known else None for index in range(len(groups))]
        self._records.append(
            PlannedRates(
                kind=type(scheduler).__name__ if scheduler is not None else "",
                num_steps=curve.num_steps if curve is not None else 0,
                peaks=tuple(peaks),
                num_trained=tuple(sum(one.requires_grad for one in group["params"]) for group in groups),
                num_scheduled=number,
                failure=schedules.why_it_cannot_step(scheduler, self._given.optimizer) if fails else "",
            )
        )

    def _peak(self, curve: schedules.Curve, index: int) -> float | None:
        """The highest rate of a group; None where the group's rate is not what its steps are made with."""
        peak, optimizer = curve.peak(index), self._given.optimizer
        if optimizer.param_groups[index].get("lr") is None:
            return None
        try:
            return None if peak == 0 and moves_without_rate(optimizer, index) else peak
        except NoCopy:
            return None

    def _find_gradients(self) -> None:
        """Those of a batch where there is one, else the stored ones; None of them if one is non-finite."""
        given = self._given
        stored: dict[int, Tensor | None] = {id(one): one.grad for _, one in groups_of(given.optimizer)}
        if given.batch is not None and given.loss is not None and self._fits_twice():
            self._progress("a step with the batch, on a copy")
            try:
                value, found = batch_gradients(unwrapped(given.model), given.batch, given.loss)
                self._gradients, self._source = found, "of a batch"
                self._facts.append(("loss of the batch", f"{value:.6g}"))
            except NoCopy as error:
                self._skips.append(Skip("the gradients of the batch", error.message))
        if self._gradients is None and any(gradient is not None for gradient in stored.values()):
            self._gradients, self._source = stored, "stored"

    def _fits_twice(self) -> bool:
        size = sum(one.numel() * one.element_size() for one in self._given.model.parameters() if not is_lazy(one))
        if size > BUDGET // 2:
            self._skips.append(Skip("the gradients of the batch", "a copy of the model takes more than 1 GB"))
        return size <= BUDGET // 2

    def _setup(self, curve: schedules.Curve, rates: list[float]) -> OptimizerSetup:
        given = self._given
        with_gradient = (
            {key: gradient is not None for key, gradient in self._gradients.items()}
            if self._gradients is not None and self._source == "of a batch"
            else {}
        )
        with unnoticed():
            parameters, foreign = parameter_facts(given.model, given.optimizer, with_gradient, given.others)
        groups = tuple(self._group(index, curve, rates[index]) for index in range(len(rates)))
        name = type(given.optimizer).__name__
        setup = OptimizerSetup(
            name, groups, parameters, foreign, curve.num_steps, curve.steps_from, 1 + len(given.others)
        )
        lazy = sum(one.inferred == "not initialised yet" for one in parameters)
        if lazy:
            self._skips.append(Skip(f"{lazy:,} lazy parameters", "they have no shape before the first forward"))
        self._records += [GroupSettings(name, groups), setup]
        return setup

    def _group(self, index: int, curve: schedules.Curve, rate: float) -> GroupFacts:
        group = self._given.optimizer.param_groups[index]
        decay = float(group.get("weight_decay") or 0.0)
        acts: Decay = "unknown"
        try:
            acts = how_decay_acts(self._given.optimizer, index, rate)
        except NoCopy as error:
            self._skips.append(Skip(f"how the decay of group {index} acts", error.message))
        return GroupFacts(
            index=index,
            lr=rate_of(group) if group.get("lr") is not None else None,
            weight_decay=decay,
            settings=settings_of(group),
            num_parameters=len(group["params"]),
            num_elements=sum(one.numel() for one in group["params"] if not is_lazy(one)),
            decay=acts,
            peak_lr=rate if group.get("lr") is not None else 0.0,
            kept_share=curve.kept_share(index, decay) if acts == "direct" else None,
        )

    def _state(self) -> bool:
        """Records the state that a file or the optimizer holds; whether a step may start from it."""
        given, stored = self._given, self._given.stored
        if stored is None:
            state = state_as_it_stands(given.optimizer, self._names, self._named_gradients())
            if state is not None:
                self._records.append(state)
                self._note_steps(state)
            return state is not None and is_usable(state)
        if stored.weights is not None:
            self._records.append(stored_weights(stored.weights))
        if stored.optimizer is None:
            self._skips.append(Skip("the optimizer's state", f"{stored.path.name} holds no optimizer"))
            return False
        state = state_in_file(
            stored.optimizer,
            layout=layout_of(given.optimizer, self._names),
            step=stored.step,
            with_gradient=self._named_gradients(),
        )
        in_file = tuple(replace(group, decay="none") for group in groups_in_file(stored.optimizer))
        self._records += [state, compared(stored.optimizer, given.optimizer), GroupSettings("the file", in_file)]
        self._note_steps(state)
        self._facts.append(("state in the file", f"of {state.num_with_state:,} parameters{steps_text(state)}"))
        return is_usable(state) and self._load(stored.optimizer)

    def _note_steps(self, state: StoredState) -> None:
        if state.steps is not None and state.steps[0] != state.steps[1]:
            reason = "as where parameters had no gradient in some steps, or were added later"
            self._skips.append(Skip("whether all state is of one run", f"its{steps_text(state)[1:]}, {reason}"))

    def _named_gradients(self) -> list[str]:
        found = self._gradients or {}
        return [self._names[key] for key, gradient in found.items() if gradient is not None and key in self._names]

    def _load(self, state_dict: dict[str, Any]) -> bool:
        """Gives our own optimizer the stored state."""
        try:
            with unnoticed():
                self._given.optimizer.load_state_dict(copy.deepcopy(state_dict))
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            self._skips.append(Skip("a step that starts from the stored state", reason))
            return False
        return True

    def _steps(self, rates: list[float], may_start: bool) -> DryRun | None:
        """Steps on small copies, then one on copies of the parameters."""
        given, optimizer = self._given, self._given.optimizer
        probes, skips = probe_steps(optimizer, rates)
        gradients, source = self._gradients, self._source
        sparse = {key for key, one in (gradients or {}).items() if one is not None and one.layout is not torch.strided}
        if gradients is not None and sparse:
            reason = f"{count(len(sparse), 'gradient is', 'gradients are')} sparse"
            skips.append(Skip("a step on copies of the parameters with a sparse gradient", reason))
            gradients = {key: None if key in sparse else one for key, one in gradients.items()}
        bad = [one for one in (gradients or {}).values() if one is not None and not bool(one.isfinite().all())]
        if bad:
            what = f"a step with the gradients {source.replace('stored', 'that are stored')}"
            reason = f"{count(len(bad), 'of them is', 'of them are')} non-finite; `nanhunt replay` finds out why"
            skips.append(Skip(what, reason))
            gradients = None
        if gradients is None:
            source = "as the second moments say" if may_start else "of unit size"
        elif given.max_grad_norm is not None and source == "of a batch":
            gradients = clipped(gradients, given.max_grad_norm)
        run, more = dry_run(optimizer, self._names, gradients, source, rates, with_state=may_start)
        run = run and replace(run, max_norm=given.max_grad_norm, says_clipping=given.says_clipping)
        self._records += [*probes, *([run] if run is not None else [])]
        self._skips += [*skips, *more]
        return run

    def _schedule(self, curve: schedules.Curve) -> None:
        """Records each shape of the curve once, and shows the highest."""
        if not curve.kind:
            return
        # A group that the schedule does not know has no curve; that is a finding of its own.
        known = schedules.num_scheduled(self._given.scheduler)
        groups = [group for group in schedules.main_groups(curve) if known is None or group < known]
        for group in groups:
            self._records.append(self._curve_of_group(curve, group))
        self._skips.append(
            Skip("how often the loop steps the schedule", "a schedule does not say; its steps are taken for updates")
        )
        self._tables.append(rates_table(curve, groups[0] if groups else 0))

    def _curve_of_group(self, curve: schedules.Curve, group: int) -> ScheduleCurve:
        optimizer, points = self._given.optimizer, curve.of(group)
        weights = [one for index, one in groups_of(optimizer) if index == group and not is_lazy(one)]
        typical, dtype = schedules.typical_weight([one for one in weights if one.is_floating_point()])
        first = optimizer.param_groups[group]
        return ScheduleCurve(
            kind=curve.kind,
            num_steps=curve.num_steps,
            samples=schedules.thinned(points),
            given_lr=float(first.get("initial_lr", rate_of(first))),
            peak_step=schedules.peak_step(points),
            said_warmup=self._given.warmup_steps,
            num_idle=self._idle(curve, group, typical, dtype),
            typical_weight=typical,
            dtype=dtype,
            is_planned=not curve.steps_from.startswith(schedules.UNPLANNED),
            start=curve.start,
            group=group,
            num_groups=len(optimizer.param_groups),
        )

    def _idle(self, curve: schedules.Curve, group: int, typical: float, dtype: str) -> int | None:
        try:
            if depends_on_size(self._given.optimizer, group, curve.peak(group)):
                return None
        except NoCopy:
            return None
        return schedules.num_idle(curve, group, typical, dtype)

    def _clipping(self) -> None:
        given = self._given
        if given.max_grad_norm is None:
            if given.says_clipping:
                self._facts.append(("clipping", "none: every gradient reaches the optimizer as it is"))
            else:
                self._skips.append(Skip("clipping", "nobody says whether gradients are clipped (max_grad_norm)"))
            return
        effect = effect_of_one_infinity(given.max_grad_norm)
        norm = f"to a total norm of {given.max_grad_norm:g}"
        self._facts.append(("clipping", f"{norm}; {effect}" if effect else norm))
        scale, skip = loss_scale(given.scaler, given.optimizer)
        if skip is not None:
            self._skips.append(skip)
        if given.stored is not None and given.stored.capture is not None and "scaler" in given.stored.capture.payload:
            self._skips.append(
                Skip("whether gradients are clipped before they are unscaled", "a capture keeps no gradients")
            )
        gradients = [one for one in (self._gradients or {}).values() if one is not None and one.layout is torch.strided]
        if gradients:
            with torch.no_grad():
                record = clipping_of(gradients, given.max_grad_norm, scale if self._source == "stored" else None)
            self._records.append(record)
            if self._source != "stored" or scale is None:
                self._facts.append(("gradient norm", f"{record.norm:.4g}, {self._source}"))

    def _describe(self, setup: OptimizerSetup | None, run: DryRun | None) -> None:
        """What stands above the findings, and the tables."""
        if setup is None:
            return
        total = sum(group.num_elements for group in setup.groups)
        kind = type(unwrapped(self._given.model)).__name__
        own = [
            ("model", f"{kind}, {count(len(setup.parameters), 'parameter')}"),
            ("optimizer", f"{setup.optimizer}, {count(len(setup.groups), 'group')}, {count(total, 'weight')}"),
            ("weight decay", decay_text(setup)),
        ]
        if run is not None:
            own.append(("step on copies", f"gradients {run.gradients}, at {run.rate}"))
        self._facts = own + self._facts
        self._tables = [groups_table(setup), *roles_table(setup), *run_table(run), *self._tables]
