"""What a run on CPUs cannot use is turned off."""

from axolotl.integrations.base import PluginManager

from recipes.pairwise.training.cpu import LIGER, leave_out_liger


class Liger:
    """Stands in for Axolotl's plugin."""

    def pre_model_load(self, cfg):
        raise AssertionError("layers are replaced")


def test_liger_replaces_no_layers_without_a_gpu(monkeypatch):
    monkeypatch.setitem(PluginManager.get_instance().plugins, LIGER, Liger())
    leave_out_liger()
    PluginManager.get_instance().plugins[LIGER].pre_model_load({})
