"""The documentation page (static, without any request elsewhere) and the constant part of the OpenAPI document."""
