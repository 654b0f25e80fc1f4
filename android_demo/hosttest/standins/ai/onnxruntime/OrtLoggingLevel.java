package ai.onnxruntime;

public enum OrtLoggingLevel {
    ORT_LOGGING_LEVEL_WARNING(2),
    ORT_LOGGING_LEVEL_ERROR(3);

    private final int value;

    OrtLoggingLevel(int value) {
        this.value = value;
    }

    public int getValue() {
        return value;
    }
}
