"""Lightning attention inside other people's models and behind other libraries' signatures."""
