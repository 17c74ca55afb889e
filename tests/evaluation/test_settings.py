"""evaluation/settings.py: what scripts have in common."""

import pytest

import eval_cls
import eval_det
import eval_seg
from engine.config import ConfigError, load_config
from evaluation.settings import COMMON, COMMON_NULLABLE, POSITIVE, check_common


def test_a_script_needs_no_settings_that_it_does_not_use():
    check_common(load_config(COMMON, None, [], COMMON_NULLABLE))


def test_those_that_it_has_are_checked():
    for script in (eval_seg, eval_cls, eval_det):
        for name in (*POSITIVE, "log.every"):
            cfg = load_config(script.DEFAULTS, None, [f"{name}=0"], script.NULLABLE)
            with pytest.raises(ConfigError, match=f"^{name}: 0"):
                script.check_config(cfg)
        for name in ("model.in_channels=2", "optim.weight_decay=-1", "data.workers=-1"):
            with pytest.raises(ConfigError, match=f"^{name.split('=')[0]}: "):
                script.check_config(load_config(script.DEFAULTS, None, [name], script.NULLABLE))
