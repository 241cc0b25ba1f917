"""The recipe schema and its loading.  Never imports torch."""
