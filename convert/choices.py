"""Names that options of the conversions may have. Imports nothing, so that help is quick."""

LORA_FORMATS = ("diffusers", "comfyui", "peft")
LORA_DTYPES = ("float32", "bfloat16", "float16")
