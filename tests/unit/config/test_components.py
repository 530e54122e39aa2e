"""A ``_target_`` builds what cfsp defines and marks, and what allowed packages define; nothing else is run for it."""

from __future__ import annotations

import sys

import pytest

from cfsp.config.components import build
from cfsp.config.contracts import NeuronImportance
from cfsp.errors import ConfigError
from tests.conftest import mentions


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Packages of other people; importing `evil` leaves a file."""
    texts = {
        "evil": f"open({str(tmp_path / 'PWNED')!r}, 'w').close()\nclass Ext:\n    score = None\n",
        "other_package": "class Theirs:\n    def score(self):\n        return 1\n",
        "mine": (
            "import json\nfrom cfsp.importance.wanda import Wanda\nfrom jinja2 import Environment\n"
            "from other_package import Theirs\n\n\nclass Mine:\n    def __init__(self):\n        self.score = len\n\n\n"
            "class Useless:\n    pass\n"
        ),
    }
    (tmp_path / "site").mkdir()
    for name, text in texts.items():
        (tmp_path / "site" / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path


@pytest.mark.parametrize(
    "values",
    [
        {"_target_": "cfsp.tables.page.Environment", "extensions": ["evil.Ext"]},
        {"_target_": "cfsp.config.components.importlib.import_module", "name": "evil"},
        {"_target_": "cfsp.config.components.ConfigDict"},
        {"_target_": "cfsp.config.run_config.RunConfig"},
        {"_target_": "cfsp.tables.page.Path"},
        {"_target_": "cfsp.importance.wanda.__class__"},
        {"_target_": "cfsp.importance.wanda.Wanda.__init__"},
        {"_target_": "cfsp.config.components.Any"},
        {"_target_": "cfsp.evaluation.base.Evaluator"},
        {"_target_": "evil.Ext"},
        {"_target_": "cfsp.importance.wanda.Wanda", "data": {"_target_": "evil.Ext"}},
    ],
    ids=lambda values: str(values["_target_"]),
)
def test_only_marked_classes_of_cfsp_are_built(site, values):
    with pytest.raises(ConfigError) as refused:
        build("importance", values, contract=NeuronImportance)
    assert "importance" in str(refused.value)
    assert len(str(refused.value)) < 500
    assert not (site / "PWNED").exists()


def test_the_group_is_checked_before_a_class_is_called(monkeypatch):
    from cfsp.logger.wandb import WandbLogger

    monkeypatch.setattr(WandbLogger, "__init__", lambda *_, **__: pytest.fail("it was called"))
    with pytest.raises(ConfigError, match="no class for importance, it has no score"):
        build("importance", {"_target_": "cfsp.logger.wandb.WandbLogger"}, contract=NeuronImportance)


@pytest.mark.usefixtures("site")
def test_a_plug_in_s_class_is_of_the_package_that_defines_it():
    assert build("importance", {"_target_": "mine.Mine"}, ["mine"], NeuronImportance).instance.score is len
    assert build("importance", {"_target_": "mine.Wanda"}, ["mine"], NeuronImportance).target == "mine.Wanda"
    assert (
        build("importance", {"_target_": "mine.Theirs"}, ["mine", "other_package"], NeuronImportance).instance.score()
        == 1
    )
    for target, said in {
        "mine.Theirs": "plugins.allow=[mine,other_package]",
        "mine.Environment": "plugins.allow=[jinja2,mine]",
        "mine.json.decoder.JSONDecoder": "no such class",
        "mine.Useless": "no class for importance, it has no score",
    }.items():
        with pytest.raises(ConfigError) as refused:
            build("importance", {"_target_": target}, ["mine"], NeuronImportance)
        mentions([str(refused.value)], f"importance._target_={target}", said)
