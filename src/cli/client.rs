//! The HTTP client of a running server: JSON in and out, server-sent events, errors as the server words them.

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use serde_json::Value;

use super::Remote;
use crate::error::{Code, Error, Result};

/// A server and its key.
#[derive(Clone)]
pub(crate) struct Client {
    base: String,
    key: Option<String>,
    http: reqwest::Client,
}

impl Client {
    /// For `remote`.
    pub(crate) fn new(remote: &Remote) -> Result<Self> {
        let base = remote.url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        if !base.starts_with("http://") && !base.starts_with("https://") {
            return Err(Error::invalid("--url", format!("`{base}` is not an http:// or https:// address")));
        }
        Ok(Client { base, key: remote.api_key.clone(), http: reqwest::Client::new() })
    }

    /// The server's address.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    /// Whether it has a key to send.
    pub(crate) fn has_key(&self) -> bool {
        self.key.is_some()
    }

    /// GET, JSON back.
    pub(crate) async fn get(&self, path: &str) -> Result<Value> {
        self.json(self.http.get(self.address(path))).await
    }

    /// POST of JSON, JSON back.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.json(self.http.post(self.address(path)).json(body)).await
    }

    /// POST of JSON; the `data:` payloads of the event stream, until `[DONE]`.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Result<impl Stream<Item = Result<Value>> + Unpin> {
        let response = self.send(self.http.post(self.address(path)).json(body)).await?;
        let mut chunks = Box::pin(response.bytes_stream());
        Ok(Box::pin(async_stream::try_stream! {
            let mut pending: Vec<u8> = Vec::new();
            while let Some(chunk) = chunks.next().await {
                let chunk: Bytes = chunk.map_err(|error| Error::internal(format!("the stream broke off: {error}")))?;
                pending.extend_from_slice(&chunk);
                while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
                    let line: Vec<u8> = pending.drain(..=end).collect();
                    let line = String::from_utf8_lossy(&line);
                    let Some(data) = line.trim().strip_prefix("data:") else { continue };
                    if data.trim() == "[DONE]" {
                        return;
                    }
                    let value: Value = serde_json::from_str(data)?;
                    if value.get("error").is_some_and(Value::is_object) {
                        Err(error_of(500, &value))?;
                    }
                    yield value;
                }
            }
        }))
    }

    fn address(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<reqwest::Response> {
        let request = match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.text().await.unwrap_or_default();
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Err(error_of(status.as_u16(), &body))
    }

    async fn json(&self, request: reqwest::RequestBuilder) -> Result<Value> {
        let response = self.send(request).await?;
        response
            .json()
            .await
            .map_err(|error| Error::internal(format!("{} did not answer with JSON: {error}", self.base)))
    }

    fn unreachable(&self, error: &reqwest::Error) -> Error {
        let text = if error.is_connect() {
            format!(
                "no server answers at {}. Start one with `rdpo serve`, or name it with --url or RDPO_URL.",
                self.base
            )
        } else {
            format!("{} did not answer: {error}", self.base)
        };
        Error::new(Code::Overloaded, text).at("--url")
    }
}

/// Whether the error means that there is no server.
pub(crate) fn is_unreachable(error: &Error) -> bool {
    error.code == Code::Overloaded && error.param.as_deref() == Some("--url")
}

fn error_of(status: u16, body: &Value) -> Error {
    let object = &body["error"];
    let message = object["message"].as_str().or(body.as_str()).unwrap_or("no explanation");
    let code = match status {
        401 => Code::InvalidApiKey,
        404 => Code::NotFound,
        409 => Code::Conflict,
        422 => Code::Unprocessable,
        429 => Code::RateLimited,
        400..=499 => Code::InvalidValue,
        _ => Code::Internal,
    };
    let hint = if status == 401 { " Give the key with RDPO_API_KEY." } else { "" };
    let mut error = Error::new(code, format!("{message}{hint}"));
    error.param = object["param"].as_str().map(str::to_owned);
    error
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn errors_keep_the_servers_words_and_field() {
        let error = error_of(400, &json!({"error": {"message": "must be at least 1", "param": "lora.r"}}));
        assert_eq!(error.to_string(), "lora.r: must be at least 1");
        assert_eq!(error_of(502, &json!("bad gateway")).to_string(), "bad gateway");
    }

    #[tokio::test]
    async fn no_server_says_how_to_start_one() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let remote = Remote { url: format!("http://127.0.0.1:{port}/v1/"), api_key: Some("sk-secret".into()) };
        let error = Client::new(&remote).unwrap().get("/health").await.unwrap_err();
        assert!(is_unreachable(&error) && error.message.contains("rdpo serve"), "{error}");
        assert!(!error.to_string().contains("sk-secret"));
    }
}
