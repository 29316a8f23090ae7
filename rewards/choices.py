"""Names of OCR rules, engines, measures and questions. Imports nothing, so that reading a recipe does not load
an engine.
"""

RULES = ("spelling", "confident", "flow_grpo_image", "flow_grpo_video")
ENGINES = ("rapidocr", "rapidocr_v4", "paddleocr")
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
READ_MEASURES = ("text_area",)  # of the text that is read, `rewards.composite`
PANEL = ("dark", "edges", "colours", "flicker", "motion")  # measured by default
QUESTIONS = ("yes_no", "rate", "letters")  # that a vision model is asked about a whole video
