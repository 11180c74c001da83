"""What a route declares and answers. No server and no framework in it."""
