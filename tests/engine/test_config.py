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
    ],
)
def test_unreadable_configs(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        config.load_config(DEFAULTS, path, [], NULLABLE)
    with pytest.raises(ConfigError, match="no such config file"):
        config.load_config(DEFAULTS, tmp_path / "none.yaml", [], NULLABLE)


def test_yaml_numbers_are_floats_where_floats_are_meant():
    cfg = config.load_config(
        DEFAULTS, None, ["optim.lr=1e-4", "optim.weight_decay=1", "data.window=null"], NULLABLE
    )
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.data.window) == (1e-4, 1.0, None)
    assert isinstance(cfg.optim.weight_decay, float)
