//! Chat templates: the model's own Jinja source, run by minijinja with Python's string methods.

use serde::{Deserialize, Serialize};

/// One turn, as the template sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`.
    pub role: String,
    /// Text (parts already joined).
    pub content: String,
    /// Name of the speaker, if given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Tool calls of an assistant turn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<serde_json::Value>,
    /// The call a tool turn answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

impl Message {
    /// A turn of `role` with `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into(), ..Message::default() }
    }
}

/// How to render.
#[derive(Clone, Debug, PartialEq)]
pub struct RenderOptions {
    /// End with the header of an assistant turn.
    pub add_generation_prompt: bool,
    /// Leave the last turn open so that the model goes on with it.
    pub continue_final_message: bool,
    /// Tools passed to the template.
    pub tools: Option<serde_json::Value>,
    /// Extra template variables.
    pub kwargs: serde_json::Map<String, serde_json::Value>,
    /// Template source instead of the model's.
    pub template: Option<String>,
}

impl Default for RenderOptions {
    /// A prompt for generation.
    fn default() -> Self {
        RenderOptions {
            add_generation_prompt: true,
            continue_final_message: false,
            tools: None,
            kwargs: serde_json::Map::new(),
            template: None,
        }
    }
}
