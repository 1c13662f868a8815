"""How a report is shown: text for people, Markdown for bug reports, JSON for programs; all from one :class:`Report`."""

from halfbyte.doctor.report.contents import Report, compose

__all__ = ["Report", "compose"]
