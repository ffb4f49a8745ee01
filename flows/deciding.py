"""Measure more where the first measurement did not decide: further windows and blocks, within a stated budget.

Only what is undecided is measured again, and only what its undecided limits are about. Each round is made of stages
like any other, so it is cached too. All rounds were counted in when the first look was judged (flows/judging.py), so
that looking again does not raise the error; verdicts that were reached stay.
"""

from flows.judging import judge_candidates
from flows.pipeline import ORIGINAL, Products, Round, Run, ask, baselines, surviving, time_together
from flows.recipe import Recipe
from infra.console import console
from infra.isolation import StageError
from infra.tracking import StageResult
from tasks.data import more_windows
from tasks.validate import measure_reference
from tasks.validation.metrics import by_name
from tasks.validation.verdicts import Judgement


def decide(recipe: Recipe, products: Products, run: Run) -> dict[str, Judgement]:
    """The verdict on every candidate, after as many rounds as it takes or the recipe allows.

    What the rounds measured is added to `products.rounds`.
    """
    budget = recipe.validation.if_inconclusive
    judgements = judge_candidates(recipe, products)
    elapsed_s = 0.0
    for number in range(1, budget.max_rounds + 1):
        of_quality, of_speed = undecided(recipe, judgements)
        if (not of_quality and not of_speed) or elapsed_s >= 60 * budget.max_minutes:
            break
        names = ", ".join(dict.fromkeys([*of_quality, *of_speed]))
        console.print(f"  round {number}: measuring more of what is not decided: {names}")
        try:
            stages = _measure_again(recipe, products, number, of_quality, of_speed, run)
        except StageError as error:
            console.print(f"  round {number} failed, so these stay undecided: {error}", soft_wrap=True, markup=False)
            break
        if not stages:
            break
        elapsed_s += sum(stage.elapsed_s for stage in stages)
        again = judge_candidates(recipe, products)
        open_before = {*of_quality, *of_speed}
        judgements = {key: again[key] if key in open_before else before for key, before in judgements.items()}
    return judgements


def undecided(recipe: Recipe, judgements: dict[str, Judgement]) -> tuple[list[str], list[str]]:
    """Candidates that more windows might decide, and those that more blocks might.

    What was not measured, or is too little for its percentile, is not settled by more of the same.
    """
    validation = recipe.validation
    quality = {metric.name for metric in validation.quality.metrics()} if validation.quality else set()
    speed = by_name(validation.speed.metrics()) if validation.speed else {}
    if validation.price_per_hour:
        speed |= by_name(validation.price_per_hour.metrics(speed))  # what follows from the throughput
    of_quality, of_speed = [], []
    for key, judgement in judgements.items():
        if judgement.verdict != "INCONCLUSIVE":
            continue
        metrics = {check.figure.split(".")[0] for check in judgement.checks if check.can_be_settled}
        of_quality += [key] if metrics & quality else []
        of_speed += [key] if metrics & speed.keys() else []
    return of_quality, of_speed


def _measure_again(
    recipe: Recipe, products: Products, number: int, of_quality: list[str], of_speed: list[str], run: Run
) -> list[StageResult]:
    """The stages of a round, added to `products.rounds`; none if there is nothing more to measure."""
    validation, label = recipe.validation, f"round {number}"
    again = Round()
    stages: list[StageResult] = []
    if of_quality:
        windows = run(
            more_windows,
            label,
            checkpoint=products.original,
            prepared=products.data,
            data=recipe.data,
            data_fingerprint=recipe.data.fingerprint(),
            seed=recipe.seed,
            skip=number * recipe.data.num_evaluation_windows,
            num_windows=recipe.data.num_evaluation_windows,
        )
        if not windows.metrics["num_evaluation_windows"]:
            console.print("  the evaluation corpus has no more windows")
            of_quality = []
        else:
            reference = run(
                measure_reference,
                f"{label} {ORIGINAL}",
                checkpoint=products.original,
                data=windows,
                options=validation.quality,
            )
            stages += [windows, reference]
    for key in of_quality:
        with surviving(products, [], key):
            again.quality[key] = ask(f"{label} {key}", products.bundles[key], recipe, reference, windows, run)
    stages += again.quality.values()
    if of_speed and validation.speed:
        beside = baselines(products.bundles)
        names = dict.fromkeys([*of_speed, *(beside[key] for key in of_speed if key in beside)])
        bundles = {key: products.bundles[key] for key in names if key not in products.failed}
        options = validation.speed.model_copy(update={"seed": validation.speed.seed + number})
        again.speed = time_together(label, bundles, options, products, run)
        stages.append(again.speed)
    if stages:
        products.rounds.append(again)
    return stages
