"""engine/config.py: settings files that are none, and numbers as YAML writes them."""

import pytest

from engine import config
from engine.config import ConfigError
from train_moco import DEFAULTS, NULLABLE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not a YAML file"),
        ("- 1\n- 2\n", "expected sections"),
        ("optim:\n  lr: {a: 1}\n", "optim.lr"),
        ("optim:\n  lr: 0.1\n  lr: 0.2\n", "bad.yaml: .*lr stands there twice"),
        ("optim:\n  lr: 0.1\nrun:\n  out: x\noptim:\n  epochs: 3\n", "bad.yaml: .*optim stands there twice"),
    ],
)
def test_unreadable_configs(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        config.load_config(DEFAULTS, path, [], NULLABLE)
    with pytest.raises(ConfigError, match="no such config file"):
        config.load_config(DEFAULTS, tmp_path / "none.yaml", [], NULLABLE)


def test_a_config_that_is_not_there_is_named_with_the_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^configs/none.yaml: no such .*\({tmp_path}/configs/none.yaml\)"):
        config.load_config(DEFAULTS, "configs/none.yaml", [], NULLABLE)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_configs_as_other_systems_save_them(tmp_path, encoding):
    path = tmp_path / "saved.yaml"
    path.write_bytes("# für Übung\r\noptim:\r\n  lr: 0.25\r\n".encode(encoding))
    assert config.load_config(DEFAULTS, path, [], NULLABLE).optim.lr == 0.25


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "utf-32"])
def test_configs_that_are_no_text(tmp_path, encoding):
    path = tmp_path / "saved.yaml"
    path.write_bytes("# für Übung\noptim:\n  lr: 0.25\n".encode(encoding))
    with pytest.raises(ConfigError, match="saved.yaml: not a YAML file"):
        config.load_config(DEFAULTS, path, [], NULLABLE)


def test_yaml_numbers_are_floats_where_floats_are_meant():
    cfg = config.load_config(
        DEFAULTS, None, ["optim.lr=1e-4", "optim.weight_decay=1", "data.window=null"], NULLABLE
    )
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.data.window) == (1e-4, 1.0, None)
    assert isinstance(cfg.optim.weight_decay, float)
