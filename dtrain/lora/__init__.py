"""LoRA adapters of PEFT: their product with a base, their factors, and the way back to a folder that PEFT loads."""

from dtrain.lora.adapter import Adapter, AdapterSource, Target, read_adapter
from dtrain.lora.factors import lora_factors, save_adapter
from dtrain.lora.product import lora_product

__all__ = ["Adapter", "AdapterSource", "Target", "lora_factors", "lora_product", "read_adapter", "save_adapter"]
