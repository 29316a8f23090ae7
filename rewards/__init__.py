"""Rewards: what a video is worth, as a number per video.

Takes NumPy frames and returns scores. The package imports no JAX and no other package of this
project, so that worker processes and reward servers start quickly and need no accelerator.

    base                            the interface of a reward, scores, errors
    ocr/, clip, quality, judge      the rewards
    learned/                        published reward models in PyTorch, and questions to models
    own                             rewards that users write
    composite                       several rewards of one video
    pool, scorers, worker_process   scoring in worker processes, while the accelerator works
    batch_scores, pool_set          the scores of a batch; several pools that score the same videos
    server, remote/                 scoring on other machines
    choices                         names that settings may have

A new reward is a class with a method `score(frames, record) -> Score` and a factory that can be
pickled. `RewardPool(factory)` runs it on this machine, `python -m rewards.server
--reward=module:factory` on others.
"""
