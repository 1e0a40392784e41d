//! The routes, one file per resource.

mod chat;
mod completions;
mod models;
mod status;
mod tokenize;

use actix_web::web::ServiceConfig;

pub(super) fn configure(app: &mut ServiceConfig) {
    for resource in [chat::configure, completions::configure, models::configure, tokenize::configure, status::configure]
    {
        resource(app);
    }
}
