"""The error that ends an export with a sentence."""


class ExportError(ValueError):
    """Something asked of the exporter that cannot be done, or a bound that an exported graph missed."""
