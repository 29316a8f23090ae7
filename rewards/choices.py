"""Names of OCR rules, engines and questions. Imports nothing, so that reading a recipe does not load
an engine.
"""

RULES = ("spelling", "flow_grpo_image", "flow_grpo_video")
ENGINES = ("rapidocr", "paddleocr")
QUESTIONS = ("yes_no", "rate")  # that a vision model is asked about a whole video
