// Kept apart from the page so that the page needs no inline script.
"use strict";

window.SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#documentation",
  deepLinking: true,
  displayRequestDuration: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  tryItOutEnabled: true,
  // The default would ask a server on the internet to judge the document.
  validatorUrl: null,
  presets: [window.SwaggerUIBundle.presets.apis],
});
