//! The routes, one file per resource.

pub(super) mod adapters;
pub(super) mod chat;
pub(super) mod completions;
pub(super) mod models;
pub(super) mod page;
pub(super) mod rdpo;
pub(super) mod responses;
pub(super) mod score;
pub(super) mod status;
pub(super) mod tokenize;

use std::time::{SystemTime, UNIX_EPOCH};

use actix_web::web::ServiceConfig;
use actix_web::{App, FromRequest, Handler, HttpRequest, Responder, Route, guard, web};
use serde::Serialize;
use utoipa::ToSchema;

pub(super) use self::responses::StoredResponses;
use super::AppState;
use super::reply::{blocking, no_method};
use crate::error::Result;
use crate::roles::Target;

/// What a request's model is. A pinned version may have to be read from disk, where it would hold up all that the thread answers.
async fn resolve(state: &web::Data<AppState>, model: &str) -> Result<Target> {
    if !model.contains('@') {
        return state.roles.resolve(model);
    }
    let (roles, model) = (state.roles.clone(), model.to_owned());
    blocking(move || roles.resolve(&model)).await
}

/// Where the resources put their routes: gives them to the app and keeps a list of them.
pub(super) struct Routes<'a> {
    app: &'a mut ServiceConfig,
    listed: Vec<(&'static str, String)>,
}

impl Routes<'_> {
    /// A path with the methods it has; what has GET ([`reads`]) has HEAD.
    fn on(&mut self, path: &str, methods: Vec<(&'static str, Route)>) {
        let mut names: Vec<String> = methods.iter().map(|(method, _)| method.to_uppercase()).collect();
        if let Some(at) = names.iter().position(|name| name == "GET") {
            names.insert(at + 1, "HEAD".into());
        }
        let allowed = names.join(", ");
        let no_method = web::to(move |request: HttpRequest| {
            let allowed = allowed.clone();
            async move { no_method(&request, &allowed) }
        });
        let mut resource = web::resource(path).default_service(no_method);
        for (method, route) in methods {
            self.listed.push((method, path.to_owned()));
            resource = resource.route(route);
        }
        self.app.service(resource);
    }

    fn get<F, Args>(&mut self, path: &str, handler: F)
    where
        F: Handler<Args>,
        Args: FromRequest + 'static,
        F::Output: Responder + 'static,
    {
        self.on(path, vec![("get", reads().to(handler))]);
    }

    fn post<F, Args>(&mut self, path: &str, handler: F)
    where
        F: Handler<Args>,
        Args: FromRequest + 'static,
        F::Output: Responder + 'static,
    {
        self.on(path, vec![("post", web::post().to(handler))]);
    }
}

/// A route of GET, and of HEAD, whose answer leaves without its body.
fn reads() -> Route {
    web::route().guard(guard::Any(guard::Get()).or(guard::Head()))
}

pub(super) fn configure(app: &mut ServiceConfig) {
    list(app);
}

fn list(app: &mut ServiceConfig) -> Vec<(&'static str, String)> {
    let mut routes = Routes { app, listed: Vec::new() };
    for resource in [
        adapters::configure,
        chat::configure,
        completions::configure,
        models::configure,
        page::configure,
        rdpo::configure,
        responses::configure,
        score::configure,
        tokenize::configure,
        status::configure,
    ] {
        resource(&mut routes);
    }
    routes.listed
}

/// Every route as method and path, the way OpenAPI writes them.
pub fn configured_routes() -> Vec<(&'static str, String)> {
    let mut found = Vec::new();
    let _ = App::new().configure(|app| found = list(app));
    found.into_iter().map(|(method, path)| (method, path.replace(":.+}", "}"))).collect()
}

/// A list as OpenAI writes one.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct List<T: ToSchema> {
    /// `list`.
    object: &'static str,
    /// The entries.
    data: Vec<T>,
}

impl<T: ToSchema> List<T> {
    fn new(data: Vec<T>) -> Self {
        List { object: "list", data }
    }
}

/// A part of a longer list.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct PageOf<T: ToSchema> {
    /// `list`.
    object: &'static str,
    /// The entries.
    data: Vec<T>,
    /// Whether more follow: ask again with `after`.
    has_more: bool,
}

impl<T: ToSchema> PageOf<T> {
    fn new(data: Vec<T>, has_more: bool) -> Self {
        PageOf { object: "list", data, has_more }
    }
}

/// Tokens spent.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(super) struct TokensUsed {
    /// Read.
    prompt_tokens: usize,
    /// Generated.
    completion_tokens: usize,
    /// Both.
    total_tokens: usize,
}

impl TokensUsed {
    fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        TokensUsed { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
    }
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}
