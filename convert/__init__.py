import wan_jax  # noqa: F401  (it sets how Ctrl-C ends imports)
