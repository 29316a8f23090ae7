"""The training methods: losses, selection of videos, gradients."""
