//! Answers' envelope: OpenAI's error object, parsed bodies, server-sent events.

use actix_web::http::StatusCode;
use actix_web::http::header::{ALLOW, CACHE_CONTROL, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use actix_web::{HttpRequest, HttpResponse, ResponseError, web};
use futures_util::{Stream, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use utoipa::ToSchema;

use crate::error::{Code, Error, Result};

/// An error on its way to a client.
#[derive(Debug)]
pub(super) struct ApiError(pub(super) Error);

/// What a handler returns.
pub(super) type Reply = std::result::Result<HttpResponse, ApiError>;

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        ApiError(error)
    }
}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        StatusCode::from_u16(self.0.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    fn error_response(&self) -> HttpResponse {
        if self.0.status() >= 500 {
            tracing::error!(error = %self.0, "request failed");
        }
        let mut response = HttpResponse::build(self.status_code()).json(error_body(&self.0));
        match self.0.code {
            Code::RateLimited => {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            Code::Overloaded | Code::OutOfMemory | Code::Unreachable => {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
            }
            Code::InvalidApiKey => {
                response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // The SDK would try twice more, but the state will not change by itself, and the work would be done from its start.
            Code::Conflict | Code::TimedOut => {
                let name = actix_web::http::header::HeaderName::from_static("x-should-retry");
                response.headers_mut().insert(name, HeaderValue::from_static("false"));
            }
            _ => {}
        }
        response
    }
}

/// OpenAI's error object.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct ErrorReply {
    /// What went wrong.
    error: ErrorBody,
}

/// What went wrong.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct ErrorBody {
    /// What is wrong and what to do.
    message: String,
    /// Kind of error.
    #[serde(rename = "type")]
    kind: &'static str,
    /// The field it is about.
    #[schema(required)]
    param: Option<String>,
    /// Short name of the error.
    code: &'static str,
}

pub(super) fn error_body(error: &Error) -> ErrorReply {
    let (_, kind, code) = error.code.row();
    ErrorReply { error: ErrorBody { message: error.to_string(), kind, param: error.param.clone(), code } }
}

/// Reads a JSON body; a wrong type or value is a 400 naming its path.
pub(super) fn parse<T: DeserializeOwned>(body: &web::Bytes) -> Result<T> {
    if body.is_empty() {
        return Err(Error::new(Code::InvalidValue, "the body is empty: send a JSON object"));
    }
    // serde would also read a list with the fields in their order.
    let first = body.iter().find(|byte| !byte.is_ascii_whitespace());
    if first.is_some_and(|byte| b"[\"0123456789-tfn".contains(byte)) {
        return Err(Error::new(Code::InvalidValue, "the body must be a JSON object"));
    }
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let (path, text) = (error.path().to_string(), error.inner().to_string());
        if error.inner().is_syntax() || error.inner().is_eof() {
            return Error::new(Code::InvalidValue, format!("the body is not valid JSON: {text}"));
        }
        let quoted = |before: &str| text.strip_prefix(before).and_then(|rest| rest.split('`').next());
        let within = |parent: &str, field: &str| match parent {
            "" | "." => field.to_owned(),
            parent => format!("{parent}.{field}"),
        };
        if let Some(field) = quoted("unknown field `") {
            let parent = path.strip_suffix(field).unwrap_or(&path).trim_end_matches('.');
            return Error::new(Code::UnknownField, text.clone()).at(within(parent, field));
        }
        match quoted("missing field `") {
            Some(field) => Error::invalid(within(&path, field), text.clone()),
            None if path == "." => Error::new(Code::InvalidValue, text),
            None => Error::invalid(path, text),
        }
    })?;
    reader.end().map_err(|error| Error::new(Code::InvalidValue, format!("the body is not valid JSON: {error}")))?;
    Ok(value)
}

/// Makes a type read from an object and from nothing else: what serde derives also takes a list with the fields in their order.
/// The type derives its `Deserialize` with `#[serde(remote = "Self")]`.
macro_rules! read_from_objects_only {
    ($($kind:ty),*) => {$(
        impl<'de> serde::Deserialize<'de> for $kind {
            fn deserialize<D: serde::Deserializer<'de>>(source: D) -> std::result::Result<Self, D::Error> {
                struct Fields;
                impl<'de> serde::de::Visitor<'de> for Fields {
                    type Value = $kind;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str("an object")
                    }

                    fn visit_map<A: serde::de::MapAccess<'de>>(
                        self,
                        fields: A,
                    ) -> std::result::Result<Self::Value, A::Error> {
                        <$kind>::deserialize(serde::de::value::MapAccessDeserializer::new(fields))
                    }
                }
                source.deserialize_map(Fields)
            }
        }
    )*};
}
pub(super) use read_from_objects_only;

/// Runs what waits for the disk or a long computation off the threads that answer.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    web::block(work).await.map_err(|error| Error::internal(error.to_string()))?
}

/// One `data:` event.
pub(super) fn event(value: &impl Serialize) -> web::Bytes {
    web::Bytes::from(format!("data: {}\n\n", serde_json::to_string(value).unwrap_or_default()))
}

/// One event with its type's name.
pub(super) fn named_event(name: &str, value: &impl Serialize) -> web::Bytes {
    web::Bytes::from(format!("event: {name}\ndata: {}\n\n", serde_json::to_string(value).unwrap_or_default()))
}

/// An event stream, with the headers that keep proxies from holding it back.
pub(super) fn sse(stream: impl Stream<Item = web::Bytes> + 'static) -> HttpResponse {
    HttpResponse::Ok()
        .content_type("text/event-stream; charset=utf-8")
        .insert_header((CACHE_CONTROL, "no-cache"))
        .insert_header(("x-accel-buffering", "no"))
        .insert_header(("content-encoding", "identity"))
        .streaming(stream.map(Ok::<_, actix_web::Error>))
}

/// A path nobody serves, or a method it does not have.
pub(super) async fn no_route(request: HttpRequest) -> Reply {
    let text = format!("There is no route {} {}. GET /openapi.yaml lists them.", request.method(), request.path());
    Err(ApiError(Error::not_found(text)))
}

/// The path is served, the method is not; `allowed` are those it has.
pub(super) fn no_method(request: &HttpRequest, allowed: &str) -> HttpResponse {
    let text = format!("{} does not take {}, only {allowed}.", request.path(), request.method());
    let mut response = ApiError(Error::new(Code::MethodNotAllowed, text)).error_response();
    if let Ok(allowed) = HeaderValue::from_str(allowed) {
        response.headers_mut().insert(ALLOW, allowed);
    }
    response
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(default, deny_unknown_fields)]
    struct Outer {
        inner: Option<Inner>,
        count: u8,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(remote = "Self", default)]
    struct Inner {
        deep: u8,
    }

    read_from_objects_only!(Inner, Named);

    #[derive(Debug, Deserialize)]
    struct Asked {
        #[expect(dead_code)]
        model: String,
        #[expect(dead_code)]
        turns: Vec<Named>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(remote = "Self")]
    struct Named {
        name: String,
    }

    #[test]
    fn a_field_that_is_missing_is_named() {
        for (text, field) in [
            ("{}", "model"),
            ("{\"model\": \"a\"}", "turns"),
            ("{\"model\": \"a\", \"turns\": [{\"name\": \"b\"}, {}]}", "turns[1].name"),
        ] {
            let error = parse::<Asked>(&web::Bytes::from(text)).unwrap_err();
            assert_eq!((error.status(), error.param.as_deref()), (400, Some(field)), "{text}");
        }
    }

    #[test]
    fn bodies_are_objects_through_and_through() {
        let read = |text: &str| parse::<Outer>(&web::Bytes::from(text.to_owned()));
        assert_eq!(read(" {\"inner\": {\"deep\": 3}}").unwrap().inner, Some(Inner { deep: 3 }));
        assert_eq!(read("{\"inner\": null}").unwrap(), Outer::default());
        for text in ["", "[]", "[null, 3]", "7", "null", "\"x\"", "{", "{} {}", "\u{feff}{}"] {
            assert_eq!(read(text).unwrap_err().status(), 400, "{text}");
        }
        for (text, field) in [
            ("{\"inner\": [3]}", "inner"),
            ("{\"inner\": {\"deep\": \"3\"}}", "inner.deep"),
            ("{\"count\": 256}", "count"),
            ("{\"cuont\": 2}", "cuont"),
        ] {
            assert_eq!(read(text).unwrap_err().param.as_deref(), Some(field), "{text}");
        }
    }
}
