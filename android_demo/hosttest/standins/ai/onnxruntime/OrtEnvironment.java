package ai.onnxruntime;

public class OrtEnvironment implements AutoCloseable {
    private static OrtEnvironment instance;

    final long nativeHandle;

    private OrtEnvironment() throws OrtException {
        nativeHandle = Native.createEnvironment(OrtLoggingLevel.ORT_LOGGING_LEVEL_WARNING.getValue(), "ort-java");
    }

    public static synchronized OrtEnvironment getEnvironment() {
        if (instance == null) {
            try {
                instance = new OrtEnvironment();
            } catch (OrtException error) {
                throw new IllegalStateException("Failed to create OrtEnvironment", error);
            }
        }
        return instance;
    }

    public OrtSession createSession(String modelPath, OrtSession.SessionOptions options) throws OrtException {
        return new OrtSession(this, modelPath, options);
    }

    public String getVersion() {
        return Native.version();
    }

    /** Does nothing, as in the real class: the environment lives as long as the process. */
    @Override
    public void close() {}
}
