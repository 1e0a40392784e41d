"""Keeps what schemathesis makes up in bounds: models that exist, answers and jobs that are short."""

import schemathesis


@schemathesis.hook
def map_body(context, body):
    """Bounds work, not validity: what is out of range stays so."""
    if not isinstance(body, dict):
        return body
    path = context.operation.path
    if isinstance(body.get("model"), str):
        body["model"] = "reward" if "score" in path else "student"
    for field in ("lora_path", "path"):
        if isinstance(body.get(field), str) and body[field].strip():
            body[field] = "incoming/first"
    if "/completions" in path:
        for field in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(field), int) and body[field] > 8:
                body[field] = 8
        if "max_tokens" not in body and "max_completion_tokens" not in body:
            body["max_tokens"] = 8
        if isinstance(body.get("n"), int) and 3 < body["n"] <= 128:
            body["n"] = 3
    if path == "/v1/responses" and (not isinstance(body.get("max_output_tokens"), int) or body["max_output_tokens"] > 8):
        if body.get("max_output_tokens") is None or isinstance(body["max_output_tokens"], int):
            body["max_output_tokens"] = 8
    if path.startswith("/v1/rdpo"):
        if isinstance(body.get("prompts"), list) and 3 < len(body["prompts"]) <= 256:
            body["prompts"] = body["prompts"][:3]
        synthesis = body.setdefault("synthesis", {})
        if isinstance(synthesis, dict):
            synthesis.setdefault("max_tokens", 4)
            for field, most in (("max_tokens", 131072), ("samples_per_prompt", 64), ("rounds", 4)):
                if isinstance(synthesis.get(field), int) and 2 < synthesis[field] <= most:
                    synthesis[field] = 2
    return body
