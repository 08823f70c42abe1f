"""What MODEL_OR_RUN is taken for, and the settings that a run brings."""

import pytest

from notus.evaluation.models import ModelSource, find_source


def test_model_adapter_and_run(model_folder, full_run, lora_run):
    assert find_source(str(model_folder)) == ModelSource(str(model_folder), model_folder)
    adapter = find_source(str(lora_run / "model"))
    assert (adapter.folder, adapter.base, adapter.settings) == (lora_run / "model", str(model_folder), {})
    of_run = find_source(str(lora_run))
    assert (of_run.folder, of_run.base) == (lora_run / "model", str(model_folder))
    assert of_run.settings["lora"]["rank"] == 3
    assert find_source(str(full_run)).base is None


def test_the_user_goes_before_the_run_before_the_default():
    source = ModelSource(
        "", None, settings={"data": {"max_length": 7, "chat_template": None, "add_empty_system": False}}
    )
    assert source.choose(3, "data.max_length", 9) == 3
    assert source.choose(None, "data.max_length", 9) == 7
    assert source.choose(None, "data.chat_template", "zephyr") == "zephyr"
    assert source.choose(None, "data.add_empty_system", True) is False
    assert source.choose(False, "data.add_empty_system", True) is False
    assert source.choose(None, "dpo.beta", 0.1) == 0.1


@pytest.mark.parametrize("text", ["a: [", "- 1", "model: 3", "\udcff", "model: {name: resnet}\ndata: {}", "{}"])
def test_refuses_a_damaged_or_foreign_config(tmp_path, text):
    (tmp_path / "config.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.yaml: not"):
        find_source(str(tmp_path))
