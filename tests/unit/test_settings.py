"""Variables that are not settings: misspelt ones are refused, those of an orchestrator are not ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.settings import Settings, SettingsError


@pytest.mark.parametrize("service", ["CHATGLM", "CHATGLM_API", "CHATGLM_GPU_2"])
def test_what_kubernetes_tells_about_a_service_of_the_same_name_is_no_setting(service: str) -> None:
    injected = {
        f"{service}_SERVICE_HOST": "10.96.12.7",
        f"{service}_SERVICE_PORT": "8000",
        f"{service}_SERVICE_PORT_HTTP": "8000",
        f"{service}_PORT": "tcp://10.96.12.7:8000",
        f"{service}_PORT_8000_TCP": "tcp://10.96.12.7:8000",
        f"{service}_PORT_8000_TCP_PROTO": "tcp",
        f"{service}_PORT_8000_TCP_PORT": "8000",
        f"{service}_PORT_8000_TCP_ADDR": "10.96.12.7",
    }
    settings = Settings.from_environment({**injected, "CHATGLM_MODEL": "mine"})
    assert settings == Settings.from_environment({"CHATGLM_MODEL": "mine"})


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("CHATGLM_MODLE", "x", "did you mean CHATGLM_MODEL?"),
        ("CHATGLM_MAX_SEQUENCE", "4", "did you mean CHATGLM_MAX_SEQUENCES?"),
        ("CHATGLM_PORT", "9000", "is not a setting; docs/settings.md"),
        ("CHATGLM_COLOUR", "red", "is not a setting; docs/settings.md"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_with_the_nearest_one(name: str, value: str, hint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment({name: value})
    assert hint in str(caught.value)


def refusal(environment: dict[str, str]) -> str:
    with pytest.raises(SettingsError) as refused:
        Settings.from_environment(environment).served_models(lambda: ["a", "b"])
    assert "\n" not in str(refused.value)
    return str(refused.value)


def served(environment: dict[str, str]) -> list[tuple[str, tuple[str, ...], bool | None]]:
    """(name, aliases, whether it is preloaded) of every model."""
    chosen = Settings.from_environment(environment).served_models(lambda: ["a", "b"])
    return [(each.served_name, each.aliases, each.preload) for each in chosen]


def test_models_are_named_by_a_list_or_all_of_the_store() -> None:
    aliases = {"CHATGLM_ALIASES": "default"}
    assert served(aliases | {"CHATGLM_MODEL": "x:1"}) == [("x", ("default",), True)]
    assert served(aliases | {"CHATGLM_MODELS": "x:1, y"}) == [("x", ("default",), True), ("y", (), False)]
    assert served(aliases | {"CHATGLM_MODELS": "*"}) == [("a", ("default",), False), ("b", (), False)]
    assert [each[2] for each in served({"CHATGLM_MODELS": "x,y,z", "CHATGLM_PRELOAD": "z,x"})] == [True, False, True]
    assert [each[2] for each in served({"CHATGLM_MODELS": "x,y", "CHATGLM_PRELOAD": "all"})] == [True, True]
    assert [each[2] for each in served({"CHATGLM_MODELS": "x,y", "CHATGLM_PRELOAD": "none"})] == [False, False]


def test_a_file_gives_models_settings_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(
        "models:\n"
        "  - {model: chatglm2-6b, precision: int8, context_length: 4096, kv_cache_gib: 2}\n"
        "  - {model: 'chatglm2-6b:old', name: before, aliases: [old], preload: true}\n"
    )
    environment = {"CHATGLM_MODELS_FILE": str(file), "CHATGLM_MAX_SEQUENCES": "8"}
    assert served(environment)[1] == ("before", ("old",), True)
    settings = Settings.from_environment(environment)
    first, second = (settings.of(each) for each in settings.served_models(list))
    assert (first.precision, first.context_length, first.kv_cache_gib, first.max_sequences) == ("int8", 4096, 2, 8)
    assert (second.precision, second.context_length) == ("auto", 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [{model: a, precison: int8}]", "models.0.precison: Extra inputs"),
        ("models: [{model: a, context_length: -1}]", "models.0.context_length: Input should be greater"),
        ("models: []", "models: List should have at least 1 item"),
        ("models: [{model: a}, {model: 'a:2'}]", "two models are named 'a'"),
        ("models: [", "is not valid YAML"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_wrong_file_of_models_is_refused_in_one_line(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "models.yaml"
    if text is not None:
        file.write_text(text)
    assert words in refusal({"CHATGLM_MODELS_FILE": str(file)})


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CHATGLM_MODEL": "a", "CHATGLM_MODELS": "a,b"}, "set one of CHATGLM_MODEL and CHATGLM_MODELS"),
        ({"CHATGLM_MODELS": "a,a:2"}, "two models are named 'a'"),
        ({"CHATGLM_MODELS": "a,b", "CHATGLM_PRELOAD": "c"}, "CHATGLM_PRELOAD names 'c'; served are a, b"),
        ({"CHATGLM_MODELS": "a,b", "CHATGLM_ENGINE": "vllm"}, "CHATGLM_ENGINE=vllm serves one model"),
    ],
)
def test_contradictions_about_the_models_are_refused(environment: dict[str, str], words: str) -> None:
    assert words in refusal(environment)
