//! The crate's one error: what went wrong, whose field it was, and which HTTP status that is.
//!
//! Every user-visible failure is an [`Error`] whose [`Code`] row in [`Code::row`] fixes the HTTP status and the strings of
//! OpenAI's error object. Nothing here knows the HTTP framework.

use std::fmt;

/// Result with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure it is; one row per kind in [`Code::row`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// Malformed or out-of-range input.
    InvalidValue,
    /// A parameter this server knows of and refuses.
    UnsupportedParameter,
    /// A field nobody knows.
    UnknownField,
    /// Prompt plus answer do not fit the model's context.
    ContextLengthExceeded,
    /// A remote role's endpoint takes no such texts; another conversation may be welcome.
    Refused,
    /// Missing or wrong key.
    InvalidApiKey,
    /// A path outside its root, or a route that is switched off.
    Forbidden,
    /// No model or adapter of that name.
    ModelNotFound,
    /// No such job, file, route or behaviour.
    NotFound,
    /// The route exists, the method does not.
    MethodNotAllowed,
    /// The state does not allow it: name taken, generation changed, job not pausable.
    Conflict,
    /// The body is larger than the server reads.
    TooLarge,
    /// Well-formed but unusable: an adapter of the wrong shape, a truncated weight file.
    Unprocessable,
    /// The queue is full; try later.
    RateLimited,
    /// A defect of ours, or the machine's.
    Internal,
    /// Loading or draining.
    Overloaded,
    /// The device has no memory left for this step; the server goes on.
    OutOfMemory,
    /// The request took longer than the server allows.
    TimedOut,
    /// No endpoint of a remote role answers, or each asks to be asked later. Jobs wait for it.
    Unreachable,
    /// The caller went away or cancelled. Never sent to a client.
    Cancelled,
}

impl Code {
    /// `(HTTP status, OpenAI "type", OpenAI "code")`.
    pub fn row(self) -> (u16, &'static str, &'static str) {
        match self {
            Code::InvalidValue => (400, "invalid_request_error", "invalid_value"),
            Code::UnsupportedParameter => (400, "invalid_request_error", "unsupported_parameter"),
            Code::UnknownField => (400, "invalid_request_error", "unknown_field"),
            Code::ContextLengthExceeded => (400, "invalid_request_error", "context_length_exceeded"),
            Code::Refused => (400, "invalid_request_error", "refused"),
            Code::InvalidApiKey => (401, "invalid_request_error", "invalid_api_key"),
            Code::Forbidden => (403, "permission_error", "forbidden"),
            Code::ModelNotFound => (404, "invalid_request_error", "model_not_found"),
            Code::NotFound => (404, "invalid_request_error", "not_found"),
            Code::MethodNotAllowed => (405, "invalid_request_error", "method_not_allowed"),
            Code::Conflict => (409, "invalid_request_error", "conflict"),
            Code::TooLarge => (413, "invalid_request_error", "request_too_large"),
            Code::Unprocessable => (422, "invalid_request_error", "unprocessable"),
            Code::RateLimited => (429, "rate_limit_error", "rate_limit_exceeded"),
            Code::Internal => (500, "server_error", "internal_error"),
            Code::Overloaded => (503, "server_error", "overloaded"),
            Code::OutOfMemory => (503, "server_error", "out_of_memory"),
            Code::TimedOut => (504, "server_error", "request_timeout"),
            Code::Unreachable => (503, "server_error", "endpoint_unreachable"),
            Code::Cancelled => (499, "server_error", "cancelled"),
        }
    }
}

/// A failure with its kind, its text for the user and, where there is one, the field it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// Kind, which fixes the HTTP status.
    pub code: Code,
    /// Text for the user: what is wrong and what to do.
    pub message: String,
    /// The request field (`"lora.r"`, `"messages[2].content"`), configuration key or file at fault.
    pub param: Option<String>,
}

impl Error {
    /// An error of kind `code` about no particular field.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Error { code, message: message.into(), param: None }
    }

    /// A 400 about `param`.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Error::new(Code::InvalidValue, message).at(param)
    }

    /// A 404 for something other than a model.
    pub fn not_found(message: impl Into<String>) -> Self {
        Error::new(Code::NotFound, message)
    }

    /// A 404 for a model or adapter name.
    pub fn no_model(name: &str) -> Self {
        Error::new(Code::ModelNotFound, format!("The model `{name}` does not exist. GET /v1/models lists what does."))
            .at("model")
    }

    /// A 409.
    pub fn conflict(message: impl Into<String>) -> Self {
        Error::new(Code::Conflict, message)
    }

    /// A 422 about a file, tensor or key.
    pub fn unprocessable(param: impl Into<String>, message: impl Into<String>) -> Self {
        Error::new(Code::Unprocessable, message).at(param)
    }

    /// A 500: something that should not happen.
    pub fn internal(message: impl Into<String>) -> Self {
        Error::new(Code::Internal, message)
    }

    /// The work was cancelled.
    pub fn cancelled() -> Self {
        Error::new(Code::Cancelled, "cancelled")
    }

    /// Names the field, key or file the error is about.
    pub fn at(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Whether it is about this one conversation, so that a job can drop it and go on with the others.
    pub fn is_of_one_conversation(&self) -> bool {
        matches!(self.code, Code::ContextLengthExceeded | Code::Refused)
    }

    /// Puts what was being done in front of the message.
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
    }

    /// HTTP status of the error.
    pub fn status(&self) -> u16 {
        self.code.row().0
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.param {
            Some(param) if !self.message.contains(param.as_str()) => write!(f, "{param}: {}", self.message),
            _ => f.write_str(&self.message),
        }
    }
}

impl std::error::Error for Error {}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        // Not with candle's own backtrace, where `RUST_BACKTRACE` asks for one.
        let mut bare = &error;
        while let candle_core::Error::WithBacktrace { inner, .. } = bare {
            bare = inner;
        }
        let text = bare.to_string();
        // What the driver and cuBLAS call it, however deep candle has wrapped it.
        if ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"].iter().any(|name| text.contains(name)) {
            return Error::new(Code::OutOfMemory, "the device has no memory left for this step");
        }
        Error::internal(text)
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        let advice = match error.kind() {
            std::io::ErrorKind::StorageFull => "; free some space, then resume the job",
            _ => "",
        };
        Error::internal(format!("{error}{advice}"))
    }
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        Error::internal(format!("job store: {error}"))
    }
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Error::new(Code::InvalidValue, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_memory_is_told_from_a_defect() {
        let of = |text: &'static str| {
            let driver = candle_core::Error::Cuda(Box::from(text));
            Error::from(driver.context("matmul").bt())
        };
        let full = of("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        assert_eq!((full.code, full.status()), (Code::OutOfMemory, 503));
        assert_eq!(of("CublasError(CUBLAS_STATUS_ALLOC_FAILED)").code, Code::OutOfMemory);
        assert_eq!(of("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS)").code, Code::Internal);
    }
}
