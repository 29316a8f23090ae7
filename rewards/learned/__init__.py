"""Learned rewards: published models that score videos, in PyTorch. Each is a class for
`python -m rewards.server --reward=rewards.learned.MODULE:CLASS` (docs/howto/own_rewards.md).

    videoalign   visual quality, motion quality and text alignment of a video
    hpsv3        human preference of its frames
    question     any question to a vision-language model
    local_model  a vision-language model in this process, which `question` may ask
    qwen2vl      Qwen2-VL with a head, which the first two are
    loading      finding and checking weights

Nothing here is imported by the trainer. `pip install -e '.[learned]'`.
"""
