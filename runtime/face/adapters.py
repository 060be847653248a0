"""LoRA and IP-Adapters are refused by name: the weights of a compiled transformer are fixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from runtime.base.errors import EditError, InputError


class WithoutAdapters:
    """What pipelines call on a model to adapt it; EditError for each."""

    def load_lora_adapter(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused: the weights of a compiled transformer are fixed."""
        raise EditError("LoRA cannot be loaded into a compiled transformer: fuse it into the model, then compile")

    add_adapter = set_adapters = fuse_lora = enable_lora = load_lora_adapter

    def _load_ip_adapter_weights(self, *args: object, **kwargs: object) -> NoReturn:
        raise EditError("IP-Adapter is not supported by a compiled transformer: use the eager model")


def refuse_adapters(given: Mapping[str, object]) -> None:
    """InputError for arguments of a forward call that are meant for an adapter."""
    for name, value in given.items():
        if name.endswith("attention_kwargs") and isinstance(value, Mapping):
            for key in value:
                what = "IP-Adapter" if "ip_adapter" in key else "LoRA" if key == "scale" else None
                if what:
                    raise InputError(f"{name}[{key!r}]: {what} is not supported by a compiled transformer")
