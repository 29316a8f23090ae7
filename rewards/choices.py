"""Names of OCR rules, engines, measures and questions. Imports nothing, so that reading a recipe does not load
an engine.
"""

RULES = ("spelling", "flow_grpo_image", "flow_grpo_video")
ENGINES = ("rapidocr", "paddleocr")
MEASURES = (  # of quality, `rewards.quality`
    "sharpness",
    "exposure",
    "contrast",
    "compressibility",
    "flicker",
    "motion",
    "dark",
    "edges",
    "colours",
)
PANEL = ("dark", "edges", "colours", "flicker", "motion")  # of them, measured by default
QUESTIONS = ("yes_no", "rate")  # that a vision model is asked about a whole video
