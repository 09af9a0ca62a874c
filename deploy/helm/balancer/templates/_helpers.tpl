{{/*
Names end within 63 characters, however long the release's is. 36 leave room for every suffix, and for what the
controllers append to the names of pods.
*/}}
{{- define "balancer.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 36 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 36 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 36 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "balancer.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Of the balancer's own pods: the chart's Valkey has another component. */}}
{{- define "balancer.podSelector" -}}
{{ include "balancer.selectorLabels" . }}
app.kubernetes.io/component: gateway
{{- end -}}

{{- define "balancer.valkeySelector" -}}
{{ include "balancer.selectorLabels" . }}
app.kubernetes.io/component: valkey
{{- end -}}

{{- define "balancer.labels" -}}
{{ include "balancer.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "balancer.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "balancer.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "balancer.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "balancer.trialSecret" -}}{{ include "balancer.fullname" . }}-trial{{- end -}}

{{/* The ConfigMap with the configuration, empty if there is none. */}}
{{- define "balancer.configMap" -}}
{{- if .Values.config -}}{{ include "balancer.fullname" . }}-config{{- else -}}{{ .Values.existingConfigMap.name }}{{- end -}}
{{- end -}}

{{/* A variable from a Secret: (list NAME SECRET KEY). */}}
{{- define "balancer.secretEnv" -}}
- name: {{ index . 0 }}
  valueFrom:
    secretKeyRef:
      name: {{ index . 1 }}
      key: {{ index . 2 }}
{{- end -}}

{{/* user:password@ of variables: (list AUTH USERVARIABLE PASSWORDVARIABLE). */}}
{{- define "balancer.userinfo" -}}
{{- $auth := index . 0 -}}
{{- if $auth.existingSecret -}}
{{- if $auth.usernameKey -}}$({{ index . 1 }}){{- end -}}:$({{ index . 2 }})@
{{- end -}}
{{- end -}}

{{/* The URL of modes sentinel, cluster and valkey. Kubernetes puts variables named above it in place of $(…). */}}
{{- define "balancer.redisUrl" -}}
{{- $redis := .Values.redis -}}
{{- if eq $redis.mode "valkey" -}}
redis://:$(REDIS_PASSWORD)@{{ include "balancer.fullname" . }}-valkey:6379/0
{{- else -}}
{{- $parameters := list -}}
{{- if eq $redis.mode "sentinel" -}}
{{- with $redis.sentinelAuth -}}
{{- if and .existingSecret .usernameKey -}}{{- $parameters = append $parameters "sentinel_username=$(SENTINEL_USERNAME)" -}}{{- end -}}
{{- if .existingSecret -}}{{- $parameters = append $parameters "sentinel_password=$(SENTINEL_PASSWORD)" -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $redis.tls.enabled $redis.tls.existingSecret -}}
{{- $parameters = append $parameters (printf "ssl_ca_certs=/etc/redis-tls/%s" $redis.tls.caKey) -}}
{{- if $redis.tls.clientCertificate -}}
{{- $parameters = concat $parameters (list "ssl_certfile=/etc/redis-tls/tls.crt" "ssl_keyfile=/etc/redis-tls/tls.key") -}}
{{- end -}}
{{- end -}}
{{- ternary "rediss" "redis" $redis.tls.enabled -}}+{{ $redis.mode }}://
{{- include "balancer.userinfo" (list $redis.auth "REDIS_USERNAME" "REDIS_PASSWORD") -}}
{{- join "," $redis.nodes -}}
{{- if eq $redis.mode "sentinel" -}}/{{ $redis.service }}/{{ $redis.database }}{{- end -}}
{{- with $parameters -}}?{{ join "&" . }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* The container's variables. Numbers go through toJson: as text, Helm would write 67108864 as 6.7108864e+07. */}}
{{- define "balancer.env" -}}
{{- $values := .Values -}}
{{- $trial := include "balancer.trialSecret" . -}}
{{- if include "balancer.configMap" . }}
- {name: BALANCER_CONFIG, value: /etc/balancer/balancer.yaml}
{{- end }}
- {name: BALANCER_PORT, value: {{ toJson .Values.ports.http | quote }}}
- {name: BALANCER_METRICS_PORT, value: {{ toJson .Values.ports.metrics | quote }}}
- {name: BALANCER_ADMIN_PORT, value: {{ ternary (toJson .Values.ports.admin) "0" (ne .Values.admin.existingSecret "") | quote }}}
{{- if .Values.admin.expose }}
- {name: BALANCER_ADMIN_HOST, value: {{ .Values.settings.host | default "0.0.0.0" | quote }}}
{{- end }}
- {name: BALANCER_WORKERS, value: {{ toJson .Values.workers | quote }}}
- {name: BALANCER_DRAIN_DELAY_S, value: {{ toJson .Values.drain.delaySeconds | quote }}}
- {name: BALANCER_DRAIN_TIMEOUT_S, value: {{ toJson .Values.drain.timeoutSeconds | quote }}}
- {name: BALANCER_ACCESS_LOG, value: {{ ternary "on" "off" .Values.accessLog | quote }}}
{{- if ne .Values.outbox.mode "none" }}
- {name: BALANCER_OUTBOX_DIR, value: /var/lib/balancer/outbox}
{{- end }}
{{- if .Values.tls.existingSecret }}
- {name: BALANCER_TLS_CERT_FILE, value: /etc/balancer-tls/tls.crt}
- {name: BALANCER_TLS_KEY_FILE, value: /etc/balancer-tls/tls.key}
{{- end }}
{{- if .Values.insecure }}
- {name: BALANCER_INSECURE, value: "on"}
{{- else }}
{{ include "balancer.secretEnv" (ternary (list "BALANCER_CLIENT_TOKENS" .Values.clients.existingSecret .Values.clients.key) (list "BALANCER_CLIENT_TOKENS" $trial "client-tokens") (ne .Values.clients.existingSecret "")) }}
{{- end }}
{{- with .Values.admin }}
{{- if .existingSecret }}
{{ include "balancer.secretEnv" (list "BALANCER_ADMIN_TOKEN" .existingSecret .key) }}
{{- if .listKey }}
{{ include "balancer.secretEnv" (list "BALANCER_ADMIN_TOKENS" .existingSecret .listKey) }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.secretKey }}
{{- if .existingSecret }}
{{ include "balancer.secretEnv" (list "BALANCER_SECRET_KEY" .existingSecret .key) }}
{{- if .alsoKey }}
{{ include "balancer.secretEnv" (list "BALANCER_SECRET_KEY_ALSO" .existingSecret .alsoKey) }}
{{- end }}
{{- end }}
{{- end }}
{{- if eq .Values.redis.mode "url" }}
{{ include "balancer.secretEnv" (list "BALANCER_REDIS" .Values.redis.existingSecret .Values.redis.key) }}
{{- else }}
{{- if eq .Values.redis.mode "valkey" }}
{{ include "balancer.secretEnv" (ternary (list "REDIS_PASSWORD" .Values.valkey.existingSecret .Values.valkey.key) (list "REDIS_PASSWORD" $trial "redis-password") (ne .Values.valkey.existingSecret "")) }}
{{- else }}
{{- with .Values.redis.auth }}
{{- if and .existingSecret .usernameKey }}
{{ include "balancer.secretEnv" (list "REDIS_USERNAME" .existingSecret .usernameKey) }}
{{- end }}
{{- if .existingSecret }}
{{ include "balancer.secretEnv" (list "REDIS_PASSWORD" .existingSecret .passwordKey) }}
{{- end }}
{{- end }}
{{- if eq .Values.redis.mode "sentinel" }}
{{- with .Values.redis.sentinelAuth }}
{{- if and .existingSecret .usernameKey }}
{{ include "balancer.secretEnv" (list "SENTINEL_USERNAME" .existingSecret .usernameKey) }}
{{- end }}
{{- if .existingSecret }}
{{ include "balancer.secretEnv" (list "SENTINEL_PASSWORD" .existingSecret .passwordKey) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
- {name: BALANCER_REDIS, value: {{ include "balancer.redisUrl" . | quote }}}
{{- end }}
{{- range $name, $value := .Values.settings }}
- name: BALANCER_{{ upper $name }}
  value: {{ if kindIs "bool" $value }}{{ ternary "on" "off" $value | quote }}{{ else if kindIs "string" $value }}{{ quote $value }}{{ else }}{{ toJson $value | quote }}{{ end }}
{{- end }}
{{- with .Values.otel }}
{{- if .enabled }}
- {name: BALANCER_OTEL, value: "on"}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ .endpoint | quote }}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- {name: OTEL_RESOURCE_ATTRIBUTES, value: "k8s.pod.name=$(POD_NAME),k8s.namespace.name=$(POD_NAMESPACE)"}
{{- if .headersSecret }}
{{ include "balancer.secretEnv" (list "OTEL_EXPORTER_OTLP_HEADERS" .headersSecret "OTEL_EXPORTER_OTLP_HEADERS") }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "balancer.envFrom" -}}
{{- range .Values.credentials.environment }}
- secretRef: {name: {{ . }}}
{{- end }}
{{- if and .Values.trial.enabled .Values.trial.credentials }}
- secretRef: {name: {{ include "balancer.trialSecret" . }}-credentials}
{{- end }}
{{- with .Values.extraEnvFrom }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "balancer.resources" -}}
{{- if .Values.resources -}}
{{ toYaml .Values.resources }}
{{- else -}}
{{- $workers := int .Values.workers -}}
requests:
  cpu: {{ $workers | quote }}
  memory: {{ add 64 (mul 128 $workers) }}Mi
limits:
  memory: {{ add 128 (mul 512 $workers) }}Mi
{{- end -}}
{{- end -}}

{{- define "balancer.gracePeriodSeconds" -}}
{{- with .Values.drain -}}
{{- add (int .preStopSleepSeconds) (ceil .delaySeconds | int) (ceil .timeoutSeconds | int) (int .marginSeconds) -}}
{{- end -}}
{{- end -}}

{{/* User and group of a pod; (list USER). */}}
{{- define "balancer.podSecurityContext" -}}
runAsNonRoot: true
{{- with index . 0 }}
runAsUser: {{ int . }}
runAsGroup: {{ int . }}
fsGroup: {{ int . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "balancer.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* An httpGet probe: (list ROOT PATH NUMBERS). */}}
{{- define "balancer.probe" -}}
httpGet:
  path: {{ index . 1 }}
  port: http
  {{- if (index . 0).Values.tls.existingSecret }}
  scheme: HTTPS
  {{- end }}
{{ toYaml (index . 2) }}
{{- end -}}
