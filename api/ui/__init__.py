"""The web page: Jinja2 pages, native ES modules, no session state on the server."""
