package android.os;

/** The version that a test sets. */
public class Build {
    public static class VERSION {
        public static int SDK_INT;
    }
}
