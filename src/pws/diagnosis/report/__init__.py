"""A diagnosis as one HTML page that opens without a network, and as a static picture."""

from pws.diagnosis.report.write import require_plotly, write_picture, write_report

__all__ = ["require_plotly", "write_picture", "write_report"]
