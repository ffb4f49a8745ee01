"""Promotions and rollbacks of real versions through MLflow's database, its files and the release store of a home."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from typer.testing import CliRunner

from flows import releasing
from flows.approving import Refused, answer, ask, briefing
from flows.cli import app
from flows.history import examine, lines, read
from flows.releasing import carry_out, roll_back, settle
from infra import registry, releases
from infra.ledger import Entry, entries
from infra.releases import SmokeTestFailed
from infra.signing import Unverified
from infra.standing import champions
from infra.tracking import Parent, client, start_flow
from tests.flows.released import CODE, compiled, publish_variant, register
from tests.homes import home_at

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
RECIPE = '{"name": "tiny", "seed": 0}'


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch, home_at(tmp_path_factory.mktemp("home")) as where:
        patch.setenv("COLUMNS", "200")
        yield where


@pytest.fixture(scope="module")
def parent(home: Path) -> Parent:
    found = start_flow("tiny", recipe_json=RECIPE, tags={})
    for name, value in {"winner.size_bytes": 1234.0, "winner.ttft_ms": 5.5}.items():
        client().log_metric(found.run_id, name, value)
    return found


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tiny_checkpoint, tmp_path_factory.mktemp("engine"))


@pytest.fixture
def model(request: pytest.FixtureRequest, bundle: Path, parent: Parent) -> str:
    """A registered model of the test's own, with one version."""
    name = request.node.name[:60]
    register(name, bundle, f"{name} 1", parent, with_code=is_slow(request))
    return name


@pytest.fixture
def second(request: pytest.FixtureRequest, model: str, bundle: Path, parent: Parent) -> None:
    """Another version of it."""
    register(model, bundle, f"{model} 2", parent, with_code=is_slow(request))


def is_slow(request: pytest.FixtureRequest) -> bool:
    """Whether champions are asked in a process of their own."""
    return request.node.get_closest_marker("slow") is not None


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Champions are loaded and asked here, which takes a second instead of ten of CPU; but for tests marked slow."""
    if is_slow(request):
        return

    def load(model: str, version: str) -> None:
        served = mlflow.pyfunc.load_model(f"models:/{model}@champion")
        assert str(client().get_model_version_by_alias(model, "champion").version) == version
        assert all(map(releases._is_answer, served.predict(list(releases.PROMPTS), params={"max_new_tokens": 4})))

    monkeypatch.setattr(releases, "smoke_test", load)


def request(model: str, version: str, who: str = "ada", **options: object) -> Entry:
    defaults = {"two_person": False, "approval_hours": 1.0, "revalidate": "if_hardware_differs"}
    return ask(model, version, who=who, why="smaller", **{**defaults, **options})


def promote(model: str, version: str) -> Entry:
    asked = request(model, version)
    answer(asked, who="ben", why="looked at it", approve=True)
    return carry_out(asked)


def aliases(model: str) -> dict[str, str]:
    found = client().get_registered_model(model).aliases
    return {name: str(found[name]) for name in ("champion", "previous") if name in found}


def whats(model: str) -> list[tuple[str, str]]:
    return [(entry.what, entry.version) for entry in entries(model)]


def stored(model: str, version: str, name: str) -> Path:
    """A file of a version where MLflow keeps it."""
    found = client().get_logged_model(registry.find_version(f"models:/{model}/{version}").tags["model_id"])
    (file,) = Path(found.artifact_location.removeprefix("file://")).rglob(name)
    return file


def damage(file: Path) -> None:
    file.chmod(0o644)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_promoted_served_and_rolled_back(model, second, home, capsys):
    first = promote(model, "1")
    assert (first.what, first.version, first.replaces) == ("promoted", "1", None)
    assert aliases(model) == {"champion": "1"}
    second = promote(model, "candidate")
    assert (second.version, second.replaces) == ("2", "1")
    assert aliases(model) == {"champion": "2", "previous": "1"}

    # A champion whose files are damaged is found, and gone back from
    damage(stored(model, "2", "note.txt"))
    (problem,) = [finding.said for finding in examine(model) if finding.is_problem]
    assert "note.txt" in problem
    assert "was changed after it was signed" in problem
    back = roll_back(model, who="ada", why="version 2 is damaged")
    assert (back.what, back.version, back.replaces) == ("rolled back", "1", "2")
    assert aliases(model) == {"champion": "1"}  # nothing before it, and 2 is nobody's `previous`
    assert champions(entries(model)) == ["1"]
    assert stored(model, "2", "note.txt").exists()

    assert whats(model) == [
        *[(what, "1") for what in ("requested", "approved", "started", "promoted")],
        *[(what, "2") for what in ("requested", "approved", "started", "promoted")],
        *[(what, "1") for what in ("started", "rolled back")],
    ]
    told = "\n".join(lines(read(model)))
    assert "ben            approved" in told
    assert "version 1, which was 2" in told
    assert "version 2 is damaged" in told
    tags = registry.find_version(f"models:/{model}/1").tags
    assert tags["release.rolled_back"].endswith("by ada: version 2 is damaged")
    with pytest.raises(ValueError, match="has no earlier champion than version 1"):
        roll_back(model, who="ada", why="again")


def test_the_approver_sees_report_and_champion(model, second):
    promote(model, "1")
    told = briefing(request(model, "2", two_person=True))
    assert "**ada** asks to promote version 2" in told
    assert "today's champion, version 1" in told
    assert "| ttft_ms | 5.5 | 5.5 |" in told
    assert "somebody other than ada" in told


def test_a_damaged_target_is_restored_from_the_release_store(model, second):
    promote(model, "1")
    promote(model, "2")
    damage(stored(model, "1", "note.txt"))
    stored(model, "1", "manifest.json").unlink()
    assert roll_back(model, who="ada", why="two is slow").version == "1"
    assert not [finding for finding in examine(model) if finding.is_problem]


def test_a_target_that_is_damaged_everywhere_is_not_served(model, second, home):
    promote(model, "1")
    promote(model, "2")
    damage(stored(model, "1", "note.txt"))
    copied = next(entry.copy_sha256 for entry in entries(model) if (entry.what, entry.version) == ("promoted", "1"))
    (file,) = (home / "production" / "artifacts" / copied).rglob("note.txt")
    damage(file)
    with pytest.raises(ValueError, match=r"note\.txt.*Its copy does not help: .*note\.txt"):
        roll_back(model, "1", who="ada", why="two is slow")
    assert aliases(model) == {"champion": "2", "previous": "1"}
    problems = [finding.said for finding in examine(model) if finding.is_problem]
    assert len(problems) == 2
    assert any(problem.startswith("The copy of version 1") for problem in problems)


@pytest.mark.slow
def test_a_version_that_does_not_answer_is_not_left_as_champion(model, bundle, parent, tmp_path):
    promote(model, "1")
    silent = tmp_path / "silent"
    shutil.copytree(bundle, silent)
    for weights in [*silent.rglob("*.onnx"), *silent.rglob("*.data")]:
        weights.write_bytes(b"no model")
    found = publish_variant(silent, "silent", parent)
    version = registry.register(model, bundle=found, parent=parent, verdict="ACCEPT", **CODE).version
    with pytest.raises(SmokeTestFailed, match=r"does not answer: .*The champion of .* is version 1"):
        promote(model, version)
    assert aliases(model) == {"champion": "1"}
    assert whats(model)[-1] == ("failed", version)
    with pytest.raises(ValueError, match=f"version {version} never was one"):
        roll_back(model, version, who="ada", why="why not")


def test_two_at_once_end_with_one_champion_and_one_refusal(model, second):
    both = [request(model, version) for version in "12"]
    for each in both:
        answer(each, who="ben", why="fine", approve=True)
    carry_out(both[0])
    with pytest.raises(Refused, match=r"Version 2 .* was to replace nothing; the champion is version 1 now"):
        carry_out(both[1])
    assert aliases(model) == {"champion": "1"}
    assert whats(model)[-1] == ("refused", "2")
    with pytest.raises(Refused, match="is done with"):
        answer(both[1], who="ben", why="again", approve=True)


def test_asking_while_aliases_are_being_moved_is_refused(model):
    with (
        releasing.writer(model),
        pytest.raises(Refused, match=r"Aliases of .* are being moved at this moment: pro"),
    ):
        request(model, "1")
    assert request(model, "1").what == "requested"


def test_who_asked_may_not_approve_where_two_are_needed(model):
    asked = request(model, "1", two_person=True)
    for _ in range(2):
        with pytest.raises(Refused, match=r"Ada asked to promote version 1 .* somebody else must approve it"):
            answer(asked, who=" Ada ", why="I am sure", approve=True)
    assert whats(model) == [("requested", "1"), ("refused", "1")]  # said once, and it stays open
    answer(asked, who="ben", why="fine", approve=True)
    assert carry_out(asked).what == "promoted"


def test_an_approval_that_comes_too_late_does_not_count(model):
    asked = request(model, "1", approval_hours=1e-9)
    with pytest.raises(Refused, match=r"The request of ada to promote version 1 expired on 20.* Ask again"):
        answer(asked, who="ben", why="late", approve=True)
    assert aliases(model) == {}
    again = request(model, "1", approval_hours=1e-5)  # 36 ms
    assert again.number != asked.number


def test_what_was_refused_is_not_carried_out(model):
    asked = request(model, "1")
    with pytest.raises(Refused, match="must be approved; it is open"):
        carry_out(asked)
    answer(asked, who="ben", why="too slow", approve=False)
    with pytest.raises(Refused, match="must be approved; it is done"):
        carry_out(asked)
    assert aliases(model) == {}


def test_tampered_unsigned_and_rejected_versions_are_refused_and_recorded(model, second, parent):
    damage(stored(model, "1", "note.txt"))
    with pytest.raises(Refused, match=r"Version 1 of .* must not be used.*note\.txt.* was changed"):
        request(model, "1")
    stored(model, "2", "signature.json").unlink()
    with pytest.raises(Refused, match=r"Version 2 of .* must not be used.*is not signed"):
        request(model, "2")
    client().set_model_version_tag(model, "2", "verdict", "REJECT")
    with pytest.raises(Refused, match="must have the verdict ACCEPT; it has REJECT"):
        request(model, "2")
    assert whats(model) == [("refused", version) for version in "122"]
    assert all(entry.why for entry in entries(model))


def test_files_that_change_after_the_approval_are_not_promoted(model):
    asked = request(model, "1")
    answer(asked, who="ben", why="fine", approve=True)
    damage(stored(model, "1", "note.txt"))
    with pytest.raises(Unverified, match=r"note\.txt"):
        carry_out(asked)
    assert aliases(model) == {}


def test_a_moved_alias_and_a_cut_ledger_are_found(model, second, home):
    promote(model, "1")
    client().set_registered_model_alias(model, "champion", "2")
    assert any("Somebody moved it" in finding.said for finding in examine(model) if finding.is_problem)
    client().set_registered_model_alias(model, "champion", "1")
    assert not any(finding.is_problem for finding in examine(model))
    (home / "ledger" / model / "4.json").unlink()
    said = [finding.said for finding in examine(model) if finding.is_problem]
    assert any("ends at entry 3; MLflow was told of entry 4" in each for each in said)


def test_what_is_measured_on_other_hardware_is_judged_here(model, monkeypatch):
    from flows import approving

    other = {**approving.hardware(), "cpu": "Another CPU"}
    monkeypatch.setattr(approving, "hardware", lambda: other)
    with pytest.raises(ValueError, match="the recipe of"):  # that of these tests names nothing to measure
        request(model, "1")
    assert request(model, "1", revalidate="never").what == "requested"
    assert "another machine than this (processor: " in briefing(request(model, "1", revalidate="never"))


def test_names_that_are_no_version_are_refused_in_a_sentence(model):
    for command, alias in (("promote", "candidate"), ("approve", "candidate"), ("rollback", "previous")):
        for name, version, problem in (
            (model, "latest", f"A version of {model} is its number, or '{alias}'; got 'latest'"),
            (model, "99", f"There is no models:/{model}/99"),
            ("nobody", alias, "There is no "),
        ):
            said = CliRunner().invoke(app, [command, name, version, "--who", "ada", "--why", "x"])
            assert said.exit_code == 2, said.output
            assert problem in said.stderr
            assert "Traceback" not in said.output
    assert entries(model) == []


def test_the_command_line_asks_approves_and_tells(model):
    runner = CliRunner()
    said = runner.invoke(app, ["promote", model, "1", "--who", "ada", "--why", "smaller", "--two-person"])
    assert said.exit_code == 4, said.output
    assert f"waits for: slimline approve {model} 1" in said.stdout
    said = runner.invoke(app, ["promote", model, "1", "--who", "ada", "--why", "smaller", "--approve"])
    assert said.exit_code == 2
    assert "somebody else must approve it" in said.stderr
    said = runner.invoke(app, ["approve", model, "1", "--who", "ben", "--why", "fine"])
    assert said.exit_code == 0, said.output
    assert f"promoted: version 1 of {model} is the champion; it was nothing" in said.stdout
    said = runner.invoke(app, ["promote", model, "1", "--who", "ada", "--why", "smaller"])
    assert said.exit_code == 2
    assert "is the champion already" in said.stderr
    said = runner.invoke(app, ["history", model])
    assert [line.split()[4] for line in said.stdout.splitlines()] == [
        "requested",
        "refused",
        "approved",
        "started",
        "promoted",
    ]
    said = runner.invoke(app, ["verify", model])
    assert said.exit_code == 0, said.output
    assert "every byte in MLflow is as it was signed" in said.stdout
    damage(stored(model, "1", "note.txt"))
    said = runner.invoke(app, ["verify", model])
    assert said.exit_code == 1
    said = runner.invoke(app, ["history", "nobody"])
    assert said.exit_code == 2
    assert "Nothing was released of 'nobody'. There is a ledger of: " in said.stderr


def test_verifying_nothing_says_so(tmp_path):
    with home_at(tmp_path):
        said = CliRunner().invoke(app, ["verify"])
    assert said.exit_code == 0, said.output
    assert "nothing to verify" in said.stdout


def left_untested(model: str, version: str) -> Entry:
    """An approved promotion that ended after the alias had moved, and before the model was asked."""
    asked = request(model, version)
    answer(asked, who="ben", why="fine", approve=True)

    def end(*_: object) -> None:
        raise ConnectionError("MLflow does not answer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(releasing, "smoke_test", end)
        with pytest.raises(ConnectionError):
            carry_out(asked)
    return asked


def test_what_a_process_that_is_gone_has_started_is_finished(model):
    asked = left_untested(model, "1")
    assert aliases(model) == {"champion": "1"}
    assert any("was not finished" in finding.said for finding in examine(model) if finding.is_problem)
    assert settle(model).what == "promoted"
    assert settle(model) is None
    assert carry_out(asked).what == "promoted"  # the same entry, not another
    assert whats(model).count(("promoted", "1")) == 1


def test_a_rollback_does_not_wait_for_what_was_not_tested(model, second):
    promote(model, "1")
    left_untested(model, "2")
    assert aliases(model) == {"champion": "2"}
    back = roll_back(model, who="ada", why="it hangs")
    assert (back.version, back.replaces) == ("1", "2")
    assert aliases(model) == {"champion": "1"}
    assert whats(model)[-3:] == [("interrupted", "2"), ("started", "1"), ("rolled back", "1")]
