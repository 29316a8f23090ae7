"""What a video is worth: numpy frames in, numbers out. Imports no JAX and nothing else of this
project.
"""
