"""The API documentation page, which loads nothing from other servers, and the constant part of the OpenAPI document."""
